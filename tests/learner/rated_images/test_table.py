"""Tables of rated images in every format, what is said of wrong ones, and AVA's published mean."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet
import pytest

from ray_ddpo.learner.aesthetic_head.formats import READERS, format_of
from ray_ddpo.learner.aesthetic_head.table import mean_rating, read_table

AVA_LABELS = Path(__file__).parents[3].parent / "shared" / "data" / "ava" / "ava_labels_test.json"
AVA_LINES = "1 953619 0 1 5 17 38 36 15 6 5 1 1 22 1396\n2 953958 10 7 15 26 26 21 10 8 1 2 15 21 1396\n"


def text_table(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def test_the_mean_of_votes_by_hand() -> None:
    assert mean_rating([1, 0, 3]) == 2.5  # (1·1 + 3·3) / 4
    assert mean_rating([0, 0, 0, 0, 0, 0, 0, 0, 0, 2]) == 10


@pytest.mark.parametrize("separator", [",", ";", "\t"])
def test_a_csv_of_ratings(tmp_path: Path, separator: str) -> None:
    text = "\ufeffid|path|rating\n1|a.png|3.5\n2|deep/b c.png|-1e1\n".replace("|", separator)
    images = read_table(text_table(tmp_path / "t.csv", text))
    assert images.paths == ("a.png", "deep/b c.png") and images.ratings.tolist() == [3.5, -10]
    assert images.splits is None


def test_votes_in_columns_of_their_own_or_as_a_list(tmp_path: Path) -> None:
    text_table(tmp_path / "columns.csv", "path,votes_1,votes_2,votes_3,split\na,1,0,3,train\nb,0,5,0,test\n")
    text_table(tmp_path / "list.csv", 'path,votes,split\na,"[1, 0, 3]",train\nb,0 5 0,test\n')
    columns = {"path": ["a", "b"], "votes": [[1, 0, 3], [0, 5, 0]], "split": ["train", "test"]}
    parquet.write_table(pa.table(columns), tmp_path / "list.parquet")
    for name in ("columns.csv", "list.csv", "list.parquet"):
        images = read_table(tmp_path / name)
        assert images.paths == ("a", "b") and images.ratings.tolist() == [2.5, 2]
        assert images.splits == ("train", "test")


def test_avas_own_file_is_known_by_its_shape(tmp_path: Path) -> None:
    table = text_table(tmp_path / "AVA.txt", AVA_LINES)
    assert format_of(table) == "ava"
    images = read_table(table)
    assert images.paths == ("953619.jpg", "953958.jpg")
    # (2·1 + 3·5 + 4·17 + 5·38 + 6·36 + 7·15 + 8·6 + 9·5 + 10·1) / 124
    assert images.ratings == pytest.approx([699 / 124, 592 / 126])


@pytest.mark.thorough
@pytest.mark.skipif(not AVA_LABELS.is_file(), reason=f"AVA's vote histograms are not in {AVA_LABELS.parent}")
def test_avas_vote_histograms_have_the_published_mean() -> None:
    images = read_table(AVA_LABELS)
    assert len(images.paths) == 25_551 and images.paths[0] == "231893.jpg"
    assert images.ratings.mean() == pytest.approx(5.377, abs=5e-4)
    assert images.ratings.std() == pytest.approx(0.734, abs=5e-4)


@pytest.mark.skipif(not AVA_LABELS.is_file(), reason=f"AVA's vote histograms are not in {AVA_LABELS.parent}")
def test_the_same_votes_have_the_same_ratings_in_every_format(tmp_path: Path) -> None:
    entries = json.loads(AVA_LABELS.read_text())[:200]
    lines = [" ".join(map(str, (1, entry["image_id"], *entry["label"], 0, 0, 9))) for entry in entries]
    text_table(tmp_path / "AVA.txt", "\n".join(lines))
    text_table(tmp_path / "ava.json", json.dumps(entries))
    columns = {
        "path": [f"{entry['image_id']}.jpg" for entry in entries],
        "votes": [entry["label"] for entry in entries],
    }
    parquet.write_table(pa.table(columns), tmp_path / "ava.parquet")
    tables = [read_table(tmp_path / name) for name in ("AVA.txt", "ava.json", "ava.parquet")]
    assert all(table.paths == tables[0].paths for table in tables)
    assert all(np.array_equal(table.ratings, tables[0].ratings) for table in tables)


WRONG = {
    "no rating": ("path,score\na,1\n", r"has the columns \['path', 'score'\]: it needs path, and one of rating, votes"),
    "no path": ("file,rating\na,1\n", r"has the columns \['file', 'rating'\]: it needs path"),
    "two ratings": ("path,rating,votes\na,1,[1 2]\n", "it needs path, and one of"),
    "a gap in the votes": ("path,votes_1,votes_3\na,1,1\n", "numbered 1, 2, … without a gap"),
    "a word for a rating": (
        "path,rating\na,1\nb,good\n",
        "line 3: column rating is 'good': it must be a finite number",
    ),
    "an empty rating": ("path,rating\na,\n", "line 2: column rating is '': it must be a finite number"),
    "not a number": ("path,rating\na,nan\n", "line 2: column rating is 'nan': it must be a finite number"),
    "no votes": (
        "path,votes_1,votes_2\na,0,0\n",
        r"line 2: column votes_… is \['0', '0'\]: it must be counts of 0 or more",
    ),
    "votes below 0": ("path,votes\na,1 -1 5\n", "line 2: column votes is .*: it must be counts of 0 or more"),
    "a split of another name": (
        "path,rating,split\na,1,val\n",
        "column split is 'val': it must be one of train, validation, test",
    ),
    "no path in a row": ("path,rating\n,1\n", "line 2: column path is '': it must be an image's path"),
    "an image twice": ("path,rating\na,1\nb,2\na,3\n", "line 4: 'a' stands in line 2 too"),
    "too many cells": ("path,rating\na,1,2\n", "line 2: it has another number of cells than the 2 columns"),
    "too few cells": ("path,rating\na\n", "line 2: it has another number of cells than the 2 columns"),
    "no rows": ("path,rating\n", "has no images"),
    "a cut line of AVA": (AVA_LINES + "3 7 1 2\n", "line 3: it has 4 fields, and AVA's lines have 15"),
    "a vote of AVA": (
        AVA_LINES + "3 7 1 2 3 4 5 6 7 8 9 x 1 2 3\n",
        "line 3: column votes is 'x': it must be a finite number",
    ),
    "json of something else": ('[{"image": 3}]', "entry 0: it must be an object with image_id and label"),
    "json that is cut": ('[{"image_id": 3', "cannot be read as json"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_table_is_refused_with_place_what_came_and_what_is_allowed(tmp_path: Path, case: str) -> None:
    text, message = WRONG[case]
    with pytest.raises(ValueError, match=message):
        read_table(text_table(tmp_path / "table.txt", text))


def test_parquet_names_row_and_column(tmp_path: Path) -> None:
    parquet.write_table(pa.table({"path": ["a", "b"], "rating": [1.0, None]}), tmp_path / "t.parquet")
    with pytest.raises(ValueError, match="row 1: column rating is None: it must be a finite number"):
        read_table(tmp_path / "t.parquet")
    (tmp_path / "t.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(ValueError, match="cannot be read as parquet"):
        read_table(tmp_path / "t.parquet")


def test_a_table_that_is_not_there_or_of_an_unknown_format(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nowhere.csv is not there"):
        read_table(tmp_path / "nowhere.csv")
    table = text_table(tmp_path / "t.csv", "path,rating\na,1\n")
    with pytest.raises(ValueError, match=r"format is 'xlsx': it must be one of \['ava', 'csv', 'json', 'parquet'\]"):
        read_table(table, "xlsx")
    with pytest.raises(ValueError, match="line 1: it has 1 fields, and AVA's lines have 15"):
        read_table(table, "ava")
    assert set(READERS) == {"ava", "csv", "json", "parquet"}
