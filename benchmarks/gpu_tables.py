"""Format the GPU benchmark's tables from the answers of its sections."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

PUBLISHED = 4.5  # A100-seconds an image, all in (ddpo-pytorch's README: LoRA, 8 × A100, 256 images a round)


def lines_of(path: Path) -> list[dict[str, Any]]:
    """Return the objects of a JSON-lines file, or an empty list if there is no file."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def markdown(folder: Path) -> str:
    """Return all tables that have data."""
    results = {each["section"]: each["found"] for each in lines_of(folder / "results.jsonl")}
    device = results.get("device")
    if device is None:
        return "nothing was measured of the device itself, so there are no tables"
    rounds = {name: found for name, found in results.items() if "round" in found}
    parts = [
        [device["machine"], "", *_limits(device), "", *_rounds(rounds, device)],
        _network(lines_of(folder / "network.jsonl"), device),
        _noise(lines_of(folder / "noise.jsonl")),
        _rewards(lines_of(folder / "rewards.jsonl")),
        _waits(lines_of(folder / "waits.jsonl")),
        (folder / "gpu_memory.md").read_text().splitlines() if (folder / "gpu_memory.md").is_file() else [],
    ]
    return "\n\n".join("\n".join(part) for part in parts if part)


def _limits(device: dict[str, Any]) -> Iterator[str]:
    rate = device["flops"]
    yield f"matrix rate {rate / 1e12:.0f} TFLOP/s in bfloat16, copies {device['copied'] / 1e12:.2f} TB/s"
    forward, both = device["forward_flops"], device["both_flops"]
    yield (
        f"a row: {forward / 1e12:.3f} TFLOP forward, {both / 1e12:.3f} with the backward pass; "
        f"at the matrix rate {forward / rate * 1e3:.2f} and {both / rate * 1e3:.2f} ms"
    )


def _rounds(rounds: dict[str, dict[str, Any]], device: dict[str, Any]) -> Iterator[str]:
    """Yield the table of sides: seconds per image, share of the matrix rate, and ratio to the bare loop."""
    yield (
        "| side | sampling s/image | learning s/image | round s/image | first round | peak GB | "
        "sampling, learning: share of matrix rate | bare loop / ours |"
    )
    yield "|---|---|---|---|---|---|---|---|"
    for name, found in rounds.items():
        images, times = found["images"], found["round"]
        each = {part: times[part] / images for part in ("sampling", "learning", "round")}
        bare = found["bare"]
        ratio = "–"
        if bare:
            ratio = ", ".join(f"{bare[part] / times[part]:.2f}" for part in ("sampling", "learning"))
        steps = found["steps"]
        shares = [
            2 * steps * device[work] / each[part] / device["flops"]
            for part, work in (("sampling", "forward_flops"), ("learning", "both_flops"))
        ]
        yield (
            f"| {name} | {each['sampling']:.3f} | {each['learning']:.3f} | {each['round']:.3f} | "
            f"{found['first']['round']:.0f} s | {times['peak_bytes'] / 1e9:.1f} | {shares[0]:.0%}, {shares[1]:.0%} | {ratio} |"
        )
    yield from _ratios(rounds)


def _ratios(rounds: dict[str, dict[str, Any]]) -> Iterator[str]:
    """Yield the speed of each of our sides relative to each of TRL's, and GPU-seconds per image."""

    def cost(name: str, part: str) -> float:
        return rounds[name]["round"][part] / rounds[name]["images"]

    yield ""
    for ours in (name for name in rounds if name.startswith("ours")):
        for trl in (name for name in rounds if name.startswith("TRL")):
            faster = [
                f"{part} {cost(trl, part) / cost(ours, part):.2f} ×" for part in ("sampling", "learning", "round")
            ]
            yield f"{ours}, against {trl}: {', '.join(faster)}"
        yield (
            f"{ours}: {1 / cost(ours, 'round'):.2f} images/s a GPU, {cost(ours, 'round'):.2f} GPU-seconds an image, "
            f"where {PUBLISHED} A100-seconds are published"
        )


def _network(found: list[dict[str, Any]], device: dict[str, Any]) -> list[str]:
    """Return the table of the network alone, with each variant's speed relative to the first, and what bits showed."""
    times = [each for each in found if "seconds" in each]
    if not times:
        return []
    rows = [
        "| passes | rows | network | ms a row | TFLOP/s | share of matrix rate | speed | first call | peak GB |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for each in times:
        same = [other for other in times if (other["passes"], other["rows"]) == (each["passes"], each["rows"])]
        cost, base = (one["seconds"] / one["rows"] for one in (each, same[0]))
        rate = device["both_flops" if "backward" in each["passes"] else "forward_flops"] / cost
        measured = f"{rate / 1e12:.1f} | {rate / device['flops']:.0%} | {base / cost:.2f} ×"
        if each["passes"].startswith("host"):  # the host only queues the pass
            measured = f"– | – | {base / cost:.2f} ×"
        ended = f"{each['first']:.1f} s | {each['peak'] / 1e9:.1f}" if "first" in each else "– | –"
        rows.append(
            f"| {each['passes']} | {each['rows']} | {each['variant']} | {cost * 1e3:.2f} | {measured} | {ended} |"
        )
    bits = [f"bits, {each.pop('bits')}: {each}" for each in [dict(each) for each in found if "bits" in each]]
    failed = [f"{each['variant']} failed: {each['failed']}" for each in found if "failed" in each]
    return [*rows, "", *bits, *failed]


def _noise(found: list[dict[str, Any]]) -> list[str]:
    if not found:
        return []
    rows = ["| way | comparison | largest log ratio |", "|---|---|---|"]
    for each in found:
        for name, (_, largest) in each["largest"].items():
            rows.append(f"| {each['way']} | {name} | {largest:.1e} |")
    return rows


def _rewards(found: list[dict[str, Any]]) -> list[str]:
    return [
        f"{each['reward']}: {each['batch'] / each['seconds']:.0f} images/s in batches of {each['batch']}"
        for each in found
    ]


def _waits(found: list[dict[str, Any]]) -> list[str]:
    return [
        f"the host waits at {each['place']} {each['times']} times in a round of {each['micro_batches']} micro-batches"
        for each in found
    ]
