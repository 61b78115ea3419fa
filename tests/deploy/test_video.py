"""A run on clips: its ledger, evaluation, trackers, report, sample, evaluate and model card; and recipes refused."""

import base64
import io
import json
import re
import sys
from pathlib import Path

import av
import numpy as np
import pyarrow.parquet as parquet
import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from ray_ddpo import cli
from ray_ddpo.common.recipe.recipe import Recipe
from ray_ddpo.common.recipe.tables import RewardTable
from ray_ddpo.common.run_storage.ledger import Ledger
from ray_ddpo.common.run_storage.png import from_png
from ray_ddpo.common.run_storage.run_folder import RunFolder
from ray_ddpo.common.video_files import frames_of
from ray_ddpo.deploy.commands.model_card.card import loading
from ray_ddpo.deploy.driver.components import build_components, components_of
from ray_ddpo.deploy.evaluation.eval_log import EvalLog
from ray_ddpo.deploy.evaluation.eval_result import eval_identity
from ray_ddpo.learner.checkpoints.checkpoint import load_checkpoint, newest_checkpoint
from ray_ddpo.train import run_training
from tests.accepted_page import assert_refused
from tests.conftest import small_tables
from tests.system.conftest import final_fingerprint
from tests.tiny_clips import video_tables
from tests.tiny_video import FRAMES
from tests.wandb_history import history

SCORERS = [{"name": "brightness", "frames": "last"}, {"name": "sharpness", "scored_frames": 2}]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("video")
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("WANDB_MODE", "offline")
        recipe = Recipe.parse(
            video_tables(
                small_tables(folder, folder),
                folder,
                rollouts={"images_every": 1},
                media={"every": 1, "images": 2},
                trackers=[{"name": "tensorboard"}, {"name": "wandb"}],
                evaluation={"every": 1, "images": 4, "batch_size": 4, "saved_images": 2, "scorers": SCORERS},
            )
        )
        run_training(recipe, serial=True)
    assert cli.main(["report", recipe.run_path()]) == 0
    return Path(recipe.run_path())


def assert_plays(data: bytes) -> None:
    """Check that a file has all frames at Wan's frame rate, as a player reads it."""
    with av.open(io.BytesIO(data)) as file:
        (stream,) = file.streams.video
        assert stream.average_rate == 16 and file.duration == pytest.approx(FRAMES / 16 * av.time_base)
    frames = frames_of(data)
    assert len(frames) == FRAMES and frames[0].std() > 1 and not np.array_equal(frames[0], frames[-1])


@pytest.mark.rotated(every=2, group="longest")
def test_the_ledger_has_posters_and_fingerprints_of_all_frames(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = Recipe.load(str(run / "recipe.toml"))
    rounds = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert rounds[0]["ratio/max_abs_log"] <= 1e-5
    rows = Ledger(RunFolder(str(run)).storage, recipe.rollouts).read(1).to_pylist()
    assert from_png(rows[0]["pixels"]).shape == (16, 16, 3) and 0 < rows[0]["reward/motion"] < 1
    assert len({row["image_fingerprint"] for row in rows}) == len(rows) == 8
    assert cli.main(["replay", str(run), "--round", "1"]) == 0  # the fingerprints are those of clips sampled again
    assert "all 8 images are equal" in capsys.readouterr().out


def test_an_evaluation_keeps_clips_and_scores_frames_as_the_recipe_says(run: Path) -> None:
    log = EvalLog(RunFolder(str(run)).storage)
    assert [clip.shape for clip in log.clips(0)] == [(FRAMES, 128, 128, 3)] * 2
    assert [image.shape for image in log.images(0)] == [(16, 16, 3)] * 2
    clip, score = log.clips(0)[0], log.scores(0)["brightness"][0]
    luma = clip[-1].astype(float) @ (0.299, 0.587, 0.114)
    assert score == pytest.approx(luma.mean() / 255, abs=0.02) and set(log.scores(2)) >= {"motion", "sharpness"}
    entry = log.entries(("image_statistics",))[-1]["image_statistics"]
    assert 0 < entry["edge_density"] < 1 and entry["entropy"] > 0


def test_wandb_gets_files_and_tensorboard_animations(run: Path) -> None:
    row = history(run)[-1]
    assert row["images/round/count"] == 2 and row["images/round/videos"][0]["_type"] == "video-file"
    files = sorted(run.glob("wandb/offline-run-*/files/media/videos/images/*.mp4"))
    assert len(files) >= 2 * 2 + 2 * 3
    assert_plays(files[0].read_bytes())
    events = EventAccumulator(str(run / "tensorboard"), size_guidance={"images": 0})
    events.Reload()
    for tag, width in (("images/round/00", 128), ("images/evaluation/00", 256)):
        (animation, *_) = events.Images(tag)
        with Image.open(io.BytesIO(animation.encoded_image_string)) as image:
            assert (image.format, image.n_frames, image.size) == ("GIF", FRAMES, (width, 128))


def test_the_report_has_clips_that_play_with_their_posters(run: Path) -> None:
    page = (run / "report" / "report.html").read_text()
    videos = re.findall(r'<video src="data:video/mp4;base64,([^"]+)" poster="data:image/png;base64,([^"]+)"', page)
    assert len(videos) == 2 * (4 + 2 + 2)  # gallery, worst and best
    for data, poster in videos[:2]:
        assert_plays(base64.b64decode(data))
        still = from_png(base64.b64decode(poster)).astype(int)
        assert np.abs(frames_of(base64.b64decode(data))[FRAMES // 2] - still).mean() < 12
    tags = re.findall(r"<video [^>]+>", page)
    assert all(word in tag for tag in tags for word in (" muted ", " loop ", " controls "))
    assert "media-src data:" in page and "the pretrained model's clip left" in page
    assert (run / "report" / "before_after.png").exists() and (run / "report" / "versions.png").exists()


def test_the_report_calls_clips_clips(run: Path) -> None:
    page = (run / "report" / "report.html").read_text()
    read = re.sub(r"<style>.*?</style>|<script>.*?</script>|<pre>.*?</pre>|<[^>]*>", "", page, flags=re.DOTALL)
    assert "held-out clips, sampled with the same prompts" in read and "clips that gained" in read
    assert re.findall(r".*\bimages?\b.*", read) == []
    assert json.loads((run / "report" / "summary.json").read_text())["made"] == "clips"


def test_sample_and_evaluate_write_clips(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["sample", "--lora", str(run), "--output", str(tmp_path / "samples"), "a cat"]) == 0
    image, clip = sorted((tmp_path / "samples").iterdir(), key=lambda path: path.suffix, reverse=True)
    assert capsys.readouterr().out.split() == [str(image), str(clip)] and clip.stem == image.stem
    assert_plays(clip.read_bytes())
    assert np.asarray(Image.open(image)).shape == (16, 16, 3)
    output = tmp_path / "evaluation"
    assert cli.main(["evaluate", str(run), "--output", str(output)]) == 0
    shown = frames_of((output / "images.mp4").read_bytes())
    assert shown.shape == (FRAMES, 64, 128, 3)  # two rows of four clips, enlarged to twice their size
    said = capsys.readouterr().out
    assert (output / "images.png").exists() and str(output / "images.mp4") in said
    assert f"16 × 16 pixels, {FRAMES} frames at 16 a second, " in said
    rows = parquet.read_table(output / "images.parquet").to_pylist()
    assert_plays(rows[0]["clip"])
    settings = json.loads((output / "evaluation.json").read_text())["settings"]
    assert (settings["frames"], settings["frame_rate"], settings["height"]) == (FRAMES, 16.0, 16)


def test_a_model_card_writes_a_video_and_its_image_shows_posters(run: Path) -> None:
    recipe = Recipe.load(str(run / "recipe.toml"))
    program = loading(recipe, components_of(recipe).policy, "alice/wan", "a cat")
    assert compile(program, "card", "exec")
    assert "from diffusers.utils import export_to_video" in program and f"num_frames={FRAMES}" in program
    assert program.endswith(').frames[0]\nexport_to_video(frames, "video.mp4", fps=16)')


def test_a_run_of_clips_has_no_preference_file(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["preferences", str(run), "--output", str(tmp_path / "pairs.parquet")]) == 2
    assert "has clips, and a preference file has images" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"reward": {"name": "motion"}}, "a reward of clips, and a family of images"),
        (
            {"reward": {"name": "function", "path": "tests.user_functions:of_clips"}},
            "a reward of clips, and a family of images",
        ),
        ({"reward": {"name": "brightness", "frames": "last"}}, "a key on frames, and a family of images"),
        ({"reward": {"name": "brightness", "scored_frames": 2}}, "a key on frames, and a family of images"),
    ],
)
def test_a_family_of_images_refuses_what_is_of_clips(changes: dict, what: str, tables: dict) -> None:
    with pytest.raises(ValueError) as error:
        build_components(Recipe.parse({**tables, **changes}))
    assert_refused(what, str(error.value))


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"reward": {"name": "motion", "frames": "last"}}, "a key on frames, and a reward of complete clips"),
        ({"reward": {"name": "brightness", "scored_frames": 6}}, "more scored frames than a clip has"),
        (
            {"algorithm": {"name": "draft"}},  # whose reward, motion, has no gradient either
            "an algorithm on the reward's gradient, and a family of video",
        ),
    ],
)
def test_a_family_of_video_refuses_what_does_not_fit_its_clips(
    changes: dict, what: str, run: Path, tables: dict, tmp_path: Path
) -> None:
    (tmp_path / "wan").symlink_to(run.parents[1] / "wan")
    if "algorithm" in changes:
        changes = {**changes, "sampling": {**tables["sampling"], "eta": 0.7, "backprop_steps": 1}}
    with pytest.raises(ValueError) as error:
        build_components(Recipe.parse(video_tables(tables, tmp_path, **changes)))
    assert_refused(what, str(error.value))


def test_without_the_package_of_files_a_recipe_of_video_is_refused(
    run: Path, tables: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "wan").symlink_to(run.parents[1] / "wan")
    recipe = Recipe.parse(video_tables(tables, tmp_path))
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(ValueError, match=r'needs the package .av., which is not installed: .*"ray-ddpo\[video\]"'):
        build_components(recipe)


@pytest.mark.system
def test_a_run_on_ray_has_the_bits_of_the_one_without(run: Path, tables: dict, tmp_path: Path, cluster: None) -> None:
    (tmp_path / "wan").symlink_to(run.parents[1] / "wan")
    recipe = Recipe.parse(video_tables(tables, tmp_path))
    newest = newest_checkpoint(RunFolder(str(run)).checkpoints)
    assert newest is not None
    assert final_fingerprint(recipe) == load_checkpoint(newest).learner.trained.fingerprint


def test_keys_on_frames_at_their_defaults_leave_an_evaluations_identity(recipe: Recipe) -> None:
    from ray_ddpo.actors.evaluation.eval_set import build_eval_set

    chosen = build_eval_set(recipe.evaluation, build_components(recipe).prompts)

    def identity(**keys: object) -> str:
        scorers = (RewardTable.model_validate({"name": "brightness", **keys}),)
        table = recipe.evaluation.model_copy(update={"scorers": scorers})
        return eval_identity(recipe.model_copy(update={"evaluation": table}), chosen)

    assert identity() == identity(frames="mean") != identity(frames="last")
    scorer = {"name": "brightness", "label": None, "weight": 1.0, "floor": None}
    assert identity() == _identity_of_old(chosen, recipe, scorer)


def _identity_of_old(chosen: object, recipe: Recipe, scorer: dict) -> str:
    """Return the identity as it was computed before there were clips."""
    import hashlib

    prompts, seeds = [prompt.text for prompt in chosen.prompts], list(chosen.seeds)  # type: ignore[attr-defined]
    sampled = [prompts, seeds, recipe.evaluation.batch_size, recipe.evaluation.ema_decay]
    return hashlib.sha256(json.dumps([sampled, [scorer]], sort_keys=True).encode()).hexdigest()[:16]
