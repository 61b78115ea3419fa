"""Weights in one buffer: they come back to the bit, and changes in transit are found."""

import dataclasses
import hashlib
import json
import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ray_ddpo.common.policy_weights import PolicyWeights, fingerprint, pack, verified


@pytest.fixture
def arrays() -> dict[str, np.ndarray]:
    generator = np.random.default_rng(0)
    shapes = {"down.lora_A": (2, 3), "down.lora_B": (3, 2), "scale": (), "empty": (0, 4)}
    return {name: generator.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


def test_arrays_come_back_by_name_and_shape_to_the_last_bit(arrays: dict[str, np.ndarray]) -> None:
    unpacked = pack(3, arrays).arrays()
    assert list(unpacked) == list(arrays)
    for name, array in arrays.items():
        assert unpacked[name].shape == array.shape and unpacked[name].tobytes() == array.tobytes()


@settings(deadline=None)
@given(st.lists(st.lists(st.integers(0, 4), max_size=3), min_size=1, max_size=6))
def test_every_shape_comes_back(shapes: list[list[int]]) -> None:
    generator = np.random.default_rng(0)
    arrays = {
        f"layer.{place}": generator.standard_normal(shape).astype(np.float32) for place, shape in enumerate(shapes)
    }
    unpacked = pack(0, arrays).arrays()
    assert all(
        np.array_equal(unpacked[name], array) and unpacked[name].shape == array.shape for name, array in arrays.items()
    )


def test_reading_does_not_copy_the_buffer(arrays: dict[str, np.ndarray]) -> None:
    weights = pack(0, arrays)
    assert all(np.shares_memory(view, weights.buffer) for view in weights.arrays().values() if view.size)


def test_an_array_that_is_not_contiguous_is_packed_in_its_own_order() -> None:
    array = np.arange(6, dtype=np.float32).reshape(2, 3).T
    assert pack(0, {"a": array}).arrays()["a"].tolist() == [[0, 3], [1, 4], [2, 5]]


def test_the_fingerprint_is_the_sha256_of_names_shapes_and_bits() -> None:
    buffer = np.array([1.0, -2.0], dtype=np.float32)
    manifest = (("a", (2,)),)
    by_hand = hashlib.sha256(json.dumps([["a", [2]]]).encode() + buffer.tobytes()).hexdigest()
    assert fingerprint(buffer, manifest) == by_hand == pack(0, {"a": buffer}).fingerprint


def test_fingerprints_are_equal_exactly_where_the_weights_are(arrays: dict[str, np.ndarray]) -> None:
    original = pack(0, arrays).fingerprint
    one_bit = {**arrays, "scale": np.nextafter(arrays["scale"], np.float32(9))}
    renamed = {name.replace("scale", "size"): array for name, array in arrays.items()}
    reshaped = {**arrays, "down.lora_A": arrays["down.lora_A"].reshape(3, 2)}
    assert len({original, *(pack(0, changed).fingerprint for changed in (one_bit, renamed, reshaped))}) == 4
    assert pack(9, {name: array.copy() for name, array in arrays.items()}).fingerprint == original


def test_minus_zero_is_another_bit_than_zero() -> None:
    plus, minus = (pack(0, {"a": np.array([zero], np.float32)}) for zero in (0.0, -0.0))
    assert plus.fingerprint != minus.fingerprint


def test_weights_that_arrive_as_they_were_sent_are_given_back(arrays: dict[str, np.ndarray]) -> None:
    weights = pickle.loads(pickle.dumps(pack(4, arrays)))
    assert verified(weights) is weights and weights.policy_version == 4


def test_weights_changed_in_transit_are_refused_with_both_fingerprints(arrays: dict[str, np.ndarray]) -> None:
    weights = pack(4, arrays)
    buffer = weights.buffer.copy()
    buffer[5] += 1
    changed = dataclasses.replace(weights, buffer=buffer)
    arrived = fingerprint(buffer, weights.manifest)
    with pytest.raises(ValueError) as error:
        verified(changed)
    assert str(error.value) == (
        f"weights of version 4 arrived with fingerprint {arrived[:12]}, and were sent with {weights.fingerprint[:12]}"
    )


def test_a_buffer_that_its_manifest_does_not_describe_is_refused() -> None:
    with pytest.raises(ValueError, match=r"version 2 are float32 \(3,\): their manifest says float32 \(4,\)"):
        PolicyWeights(2, np.zeros(3, np.float32), (("a", (2, 2)),), "")
    with pytest.raises(ValueError, match=r"version 2 are float64 \(4,\): their manifest says float32 \(4,\)"):
        PolicyWeights(2, np.zeros(4), (("a", (2, 2)),), "")
