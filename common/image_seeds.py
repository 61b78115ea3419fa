"""Many images' seeds at once: numpy's SeedSequence over a range of last words, bit for bit, in arithmetic on whole arrays."""

import numpy as np

# Of numpy.random.SeedSequence, whose results numpy promises to keep (NEP 19); after O'Neill's seed_seq_fe.
INIT_A, MULT_A = 0x43B0D7E5, 0x931E8875
INIT_B, MULT_B = 0x8B51F9DD, 0x58F38DED
MIX_LEFT, MIX_RIGHT = np.uint32(0xCA01F9DD), np.uint32(0x4973F715)
POOL_SIZE = 4
SHIFT = np.uint32(16)
MASK = 0xFFFFFFFF


class _Hash:
    """A hash of 32 bits whose constant changes with every use; the constant does not depend on what is hashed."""

    def __init__(self, constant: int, multiplier: int) -> None:
        self._constant = constant
        self._multiplier = multiplier

    def __call__(self, values: np.ndarray) -> np.ndarray:
        values = values ^ np.uint32(self._constant)
        self._constant = self._constant * self._multiplier & MASK
        values = values * np.uint32(self._constant)
        return values ^ values >> SHIFT


def _mixed(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    values = MIX_LEFT * first - MIX_RIGHT * second
    return values ^ values >> SHIFT


def _words(number: int) -> list[int]:
    """A number of any size in words of 32 bits, the lowest first."""
    words = [number & MASK]
    while number := number >> 32:
        words.append(number & MASK)
    return words


def hashed_words(entropy: list[int], count: int) -> np.ndarray:
    """For each number i below `count`: SeedSequence([*entropy, i]).generate_state(1, numpy.uint64), as uint64 [count]."""
    assert 0 <= count <= MASK, "a last word of 32 bits"
    constant = [word for number in entropy for word in _words(number)]
    words = [np.full(count, word, np.uint32) for word in constant] + [np.arange(count, dtype=np.uint32)]
    hashed = _Hash(INIT_A, MULT_A)
    zeros = np.zeros(count, np.uint32)
    pool = [hashed(words[place] if place < len(words) else zeros) for place in range(POOL_SIZE)]
    for source in range(POOL_SIZE):
        for target in range(POOL_SIZE):
            if source != target:
                pool[target] = _mixed(pool[target], hashed(pool[source]))
    for word in words[POOL_SIZE:]:
        for target in range(POOL_SIZE):
            pool[target] = _mixed(pool[target], hashed(word))
    out = _Hash(INIT_B, MULT_B)
    low, high = out(pool[0]), out(pool[1])
    return low.astype(np.uint64) | high.astype(np.uint64) << np.uint64(32)
