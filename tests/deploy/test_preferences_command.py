"""ddpo preferences: the best and worst image of each group as a file, and files that are refused."""

import io
import json
import shutil
import warnings
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
from PIL import Image

from ray_ddpo import cli
from ray_ddpo.common.preference_files import Preference, read_preferences, write_preferences
from ray_ddpo.common.recipe.recipe import Recipe
from ray_ddpo.common.run_storage.ledger import Ledger
from ray_ddpo.common.run_storage.run_folder import RunFolder
from ray_ddpo.train import run_training
from tests.common.test_reward_protocol import png_that_says
from tests.conftest import small_tables

GROUP = 4
SCORE = "reward/jpeg_compressibility"


@pytest.fixture(scope="module")
def trained(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """Return a run of three rounds in groups of four. Its ledger has the images of rounds 0 and 2."""
    tables = small_tables(tiny_model, tmp_path_factory.mktemp("preferences"))
    tables |= {"rounds": 3, "checkpoint": {"every": 1, "keep": 3}, "rollouts": {"images_every": 2}}
    tables["prompts"] = {**tables["prompts"], "images_per_prompt": GROUP}
    recipe = Recipe.parse(tables)
    run_training(recipe, serial=True)
    return RunFolder(recipe.run_path())


@pytest.fixture
def run(trained: RunFolder, tmp_path: Path) -> Path:
    return shutil.copytree(trained.location, tmp_path / "run")


def said(capsys: pytest.CaptureFixture, *words: str) -> tuple[int, str]:
    code = cli.main(["preferences", *words])
    return code, "".join(capsys.readouterr())


def ledger_rows(run: Path) -> list[dict]:
    folder = RunFolder(str(run))
    ledger = Ledger(folder.storage, folder.load_recipe([]).rollouts)
    return [row for round_index in ledger.rounds() for row in ledger.read(round_index).to_pylist()]


def without_pixels(run: Path) -> None:
    for path in (run / "rollouts").glob("*/images.parquet"):
        table = parquet.ParquetFile(path).read()
        if "pixels" in table.column_names:
            parquet.write_table(table.drop_columns("pixels"), path)


def test_a_file_has_the_best_and_the_worst_image_of_each_group(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """Images of round 1 are sampled again. Without stored images those of round 2 are, to the same bytes."""
    rows, file = ledger_rows(run), tmp_path / "pairs.parquet"
    code, text = said(capsys, str(run), "--output", str(file))
    pairs = list(read_preferences(file))
    assert code == 0 and f"{file}: {len(pairs)} pairs of" in text
    groups = [rows[start : start + GROUP] for start in range(0, len(rows), GROUP)]
    rewards = [[row["reward"] for row in group] for group in groups]
    assert len(pairs) == len(groups) == 6 and all(max(each) > min(each) for each in rewards)
    for pair, group, values in zip(pairs, groups, rewards, strict=True):
        assert pair.prompt == group[0]["prompt"]
        assert (pair.chosen_reward, pair.rejected_reward) == (max(values), min(values))
        if "pixels" in group[0]:
            assert pair.chosen == group[int(np.argmax(values))]["pixels"]
            assert pair.rejected == group[int(np.argmin(values))]["pixels"]
    without_pixels(run)
    again = tmp_path / "again.parquet"
    code, text = said(capsys, str(run), "--output", str(again))
    assert code == 0 and "round 0: round 0 was sampled with policy version 0, which no checkpoint" in text
    assert list(read_preferences(again)) == pairs[2:]


def test_rounds_whose_images_cannot_be_had_are_left_out_with_the_reason(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    for checkpoint in (run / "checkpoints").glob("round-*"):
        shutil.rmtree(checkpoint)
    code, text = said(capsys, str(run), "--output", str(tmp_path / "pairs.parquet"))
    assert code == 0 and "4 pairs" in text and "round 1: round 1 was sampled with policy version 1" in text
    without_pixels(run)
    code, text = said(capsys, str(run), "--output", str(tmp_path / "more.parquet"))
    assert code == 2 and "has no pair to write: round 0:" in text and not (tmp_path / "more.parquet").exists()


def test_an_image_that_is_another_when_sampled_again_is_not_written(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    path = run / "rollouts/round=000001/images.parquet"
    table = parquet.ParquetFile(path).read()
    rows = [row | {"image_fingerprint": "f" * 64} for row in table.to_pylist()]
    parquet.write_table(pa.Table.from_pylist(rows, schema=table.schema), path)
    code, text = said(capsys, str(run), "--output", str(tmp_path / "pairs.parquet"))
    assert code == 0 and "4 pairs" in text and "round 1: image 0 is another one when sampled again" in text


def test_a_dropped_group_and_one_with_equal_rewards_make_no_pair(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    path = run / "rollouts/round=000000/images.parquet"
    table = parquet.ParquetFile(path).read()
    rows = table.to_pylist()
    rows[1] |= {"dropped": "it could not be scored", "reward": None, SCORE: None}
    for row in rows[GROUP:]:
        row |= {"reward": 1.0, SCORE: 1.0}
    parquet.write_table(pa.Table.from_pylist(rows, schema=table.schema), path)
    code, text = said(capsys, str(run), "--output", str(tmp_path / "pairs.parquet"))
    assert code == 0 and "4 pairs" in text and "round 0: no group has different rewards" in text


def image(size: tuple[int, int] = (8, 8), shade: int = 0) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, (shade, shade, shade)).save(buffer, "PNG")
    return buffer.getvalue()


def test_both_formats_hold_the_same_pairs(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    pairs = [
        Preference(
            prompt=prompt, chosen=image(shade=1), rejected=image(shade=2), chosen_reward=1.5, rejected_reward=0.0
        )
        for prompt in ("a cat", "a dog", "a cat")
    ]
    for name in ("pairs.parquet", "pairs.jsonl"):
        write_preferences(tmp_path / name, pairs)
        assert list(read_preferences(tmp_path / name)) == pairs
        assert said(capsys, str(tmp_path / name)) == (0, f"{tmp_path / name}: 3 pairs of 2 prompts\n")
        with pytest.raises(ValueError, match="exists: give --output another name"):
            write_preferences(tmp_path / name, pairs)
    assert json.loads((tmp_path / "pairs.jsonl").read_text().splitlines()[0])["chosen"] == "pairs/000000_chosen.png"


GOOD = {"prompt": "a cat", "chosen": "one.png", "rejected": "two.png"}
BOMBS = {"bomb": 60_000, "half": 12_000, "quarter": 9_000}  # Pillow refuses the first, warns of the second


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{}", "row 1: it has no 'prompt'; a row has prompt, chosen, rejected"),
        (json.dumps({**GOOD, "prompt": 3}), "row 1: the prompt is 3, and it must be a text"),
        (json.dumps(GOOD) + "\n[]", r"row 2: it is \[\], and a row must be an object"),
        (json.dumps({**GOOD, "prompt": "\ud800"}), r"row 1: the prompt is '\\ud800', which has no UTF-8"),
        ('{"prompt": ' + "[" * 10**5, "row 1: its lists or objects are nested too deeply, and a row is an object"),
        (
            json.dumps(GOOD | {"prompt": json.loads("[" * 500 + "]" * 500)}),
            r"row 1: the prompt is \[\[\[\[\[\[\[...\]+, and",
        ),
        (
            json.dumps({**GOOD, "chosen": "x" * 5000}),
            r"row 1, chosen: the image '.*' \(\d+ characters\) cannot be used: File name",
        ),
        (json.dumps({**GOOD, "chosen": "\0.png"}), "row 1, chosen: the image .* cannot be used: embedded null"),
        (
            json.dumps({**GOOD, "chosen": "bomb.png"}),
            r"row 1, chosen: .* \(3600000000 pixels\), and an image may have 67,108,864",
        ),
        (
            json.dumps({**GOOD, "chosen": "half.png"}),
            r"row 1, chosen: .* \(144000000 pixels\), and an image may have 67,108,864",
        ),
        (
            json.dumps({**GOOD, "chosen": "quarter.png"}),
            r"row 1, chosen: .* \(81000000 pixels\), and an image may have 67,108,864",
        ),
        (
            json.dumps({**GOOD, "chosen_reward": 10**400}),
            r"row 1, chosen_reward: it is 1000.*000, and .* number of at most",
        ),
        (
            json.dumps({**GOOD, "chosen_reward": float("nan")}),
            "row 1, chosen_reward: it is nan, and .* number that is fin",
        ),
        (
            json.dumps({**GOOD, "rejected_reward": float("-inf")}),
            "row 1, rejected_reward: it is -inf, and .* that is fin",
        ),
        (json.dumps(GOOD) + '\n{"prompt": "\udce9"}', "row 2: it is no UTF-8, and a row must be: .* byte 0xe9"),
        (json.dumps(GOOD) + "\n{", "row 2: it is no JSON: "),
        (json.dumps({**GOOD, "rejected": "none.png"}), "row 1, rejected: there is no image "),
        (json.dumps({**GOOD, "chosen": 5}), "row 1, chosen: it is a int, and it must be a path or"),
        (json.dumps({**GOOD, "chosen": "text.png"}), "row 1, chosen: it is no image that can be read: no known format"),
        (json.dumps({**GOOD, "chosen": "cut.png"}), "row 1, chosen: it is no image that can be read: "),
        (json.dumps({**GOOD, "rejected": "wide.png"}), r"row 1: the chosen image has \(8, 8\) pixels and the rejected"),
        (json.dumps({**GOOD, "chosen_reward": "high"}), "row 1, chosen_reward: it is 'high', and it must be a number"),
        ("", "has no rows"),
    ],
)
def test_a_row_that_cannot_be_used_is_named(text: str, message: str, tmp_path: Path) -> None:
    files = {"one.png": image(), "two.png": image(), "wide.png": image((9, 8)), "text.png": b"no image"}
    files |= {f"{name}.png": png_that_says(side, side) for name, side in BOMBS.items()}
    for name, data in (files | {"cut.png": image()[:45]}).items():
        (tmp_path / name).write_bytes(data)
    (tmp_path / "pairs.jsonl").write_text(text, encoding="utf-8", errors="surrogateescape")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(ValueError, match=message) as caught:
            list(read_preferences(tmp_path / "pairs.jsonl"))
    assert "pairs.jsonl" in str(caught.value) and "\n" not in str(caught.value) and len(str(caught.value)) < 1000


def parquet_of(path: Path, columns: dict[str, list | pa.Array]) -> Path:
    """Write a table without compression or dictionaries, so that its bytes are in the file as they are."""
    parquet.write_table(pa.table(columns), path, compression="none", use_dictionary=False)
    return path


def test_damaged_parquet_files_are_refused_with_row_and_column(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    count = 100
    good = {"prompt": ["a cat"] * count, "chosen": [image(shade=1)] * count, "rejected": [image(shade=2)] * count}
    assert said(capsys, str(parquet_of(tmp_path / "good.parquet", good)))[0] == 0
    path = parquet_of(tmp_path / "page.parquet", good)
    chunk = parquet.ParquetFile(path).metadata.row_group(0).column(2)
    assert chunk.path_in_schema == "rejected"
    data, start = bytearray(path.read_bytes()), chunk.data_page_offset
    data[start : start + 64] = b"\xff" * 64
    path.write_bytes(data)
    code, text = said(capsys, str(path))
    assert (
        code == 2 and f"{path}, row 1 or a later one, rejected: the column is damaged, write the file again: " in text
    )
    letters = pa.array([b"a cat"] * 70 + [b"caf\xe9"] + [b"a cat"] * 29).view(pa.string())
    path = parquet_of(tmp_path / "letters.parquet", good | {"prompt": letters})
    code, text = said(capsys, str(path))
    assert code == 2 and f"{path}, row 71, prompt: it is no UTF-8, and a text must be: " in text
    path = parquet_of(tmp_path / "reward.parquet", good | {"chosen_reward": [1.0] * 99 + [float("inf")]})
    code, text = said(capsys, str(path))
    assert code == 2 and f"{path}, row 100, chosen_reward: it is inf, and it must be a number that is finite" in text
    path = parquet_of(tmp_path / "other.parquet", {"caption": ["a cat"]})
    code, text = said(capsys, str(path))
    assert code == 2 and "has the columns ['caption']; a preference file has prompt, chosen, rejected" in text


def test_an_output_that_cannot_be_written_is_refused_before_a_round_is_sampled_again(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_sampling(*_: object) -> None:
        raise AssertionError("a round was read or sampled")

    monkeypatch.setattr(Ledger, "read", no_sampling)
    for name in ("pairs.parquet", "pairs.jsonl", "images.jsonl"):
        (tmp_path / name.replace("images.jsonl", "images")).write_text("")
        code, text = said(capsys, str(run), "--output", str(tmp_path / name))
        assert code == 2 and "exists: give --output another name" in text
    code, text = said(capsys, str(run), "--output", str(tmp_path / "images/below/pairs.parquet"))
    assert code == 2 and f"because '{tmp_path / 'images'}' is no folder: give --output another name" in text
    code, text = said(capsys, str(run), "--output", f"{tmp_path}/{'x' * 5000}.parquet")
    assert code == 2 and "the output '" in text and "cannot be used: File name too long" in text
    code, text = said(capsys, f"{tmp_path}/{'x' * 5000}.parquet")
    assert code == 2 and "the preference file '" in text and "cannot be used: File name too long" in text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({SCORE: None}, f"round 0: image 5 was trained on, and its ledger has no finite '{SCORE}' of it"),
        (None, f"round 0: its ledger has no column '{SCORE}', which the run's pairs depend on"),
    ],
)
def test_a_round_whose_trained_rewards_are_not_in_the_ledger_is_left_out(
    change: dict | None, message: str, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    path = run / "rollouts/round=000000/images.parquet"
    table = parquet.ParquetFile(path).read()
    rows = table.to_pylist()
    rows[5] |= change or {}
    changed = pa.Table.from_pylist(rows, schema=table.schema)
    parquet.write_table(changed if change else changed.drop_columns(SCORE), path)
    code, text = said(capsys, str(run), "--output", str(tmp_path / "pairs.parquet"))
    assert code == 0 and "4 pairs" in text and message in text


def test_other_files_and_runs_without_groups_are_refused(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    assert "must end in .parquet or .jsonl" in said(capsys, str(run), "--output", str(tmp_path / "pairs.csv"))[1]
    (tmp_path / "bad.parquet").write_bytes(b"text")
    code, text = said(capsys, str(tmp_path / "bad.parquet"))
    assert code == 2 and "is no parquet file" in text
    assert "there is no preference file" in said(capsys, str(tmp_path / "none.jsonl"))[1]
    recipe = run / "recipe.toml"
    recipe.write_text(recipe.read_text().replace(f"images_per_prompt = {GROUP}", "images_per_prompt = 1"))
    code, text = said(capsys, str(run), "--output", str(tmp_path / "pairs.parquet"))
    assert code == 2 and "prompts.images_per_prompt = 1: a pair needs at least 2 images of a prompt" in text
