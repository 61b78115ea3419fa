"""Guard: alarms, the best version and the end of a run, with numbers worked out by hand."""

import math
from dataclasses import replace

import numpy as np
import pytest

from ray_ddpo.common.recipe.tables import GuardTable
from ray_ddpo.deploy.evaluation.guard import Alarm, JudgedVersion, VersionStats, alarms, best_version, is_over

SETTINGS = GuardTable(dark_share=0.3, sharpness=0.5, entropy=0.5, diversity=0.5)
IMAGES = {"dark_share": 0.1, "edge_density": 0.2, "sharpness": 100.0, "entropy": 6.0, "diversity": 0.2}
BASE = VersionStats({"clip_score": np.array([1.0, 3.0, 2.0, 2.0])}, IMAGES)  # spread: √(2/3) = .816


def about(now: VersionStats, settings: GuardTable = SETTINGS) -> list[str]:
    return [alarm.about for alarm in alarms(BASE, now, list(BASE.scores), settings)]


def with_scores(*scores: float) -> VersionStats:
    return replace(BASE, scores={"clip_score": np.array(scores)})


def with_images(**values: float) -> VersionStats:
    return replace(BASE, images=IMAGES | values)


def test_nothing_is_found_where_nothing_changed() -> None:
    assert about(BASE) == []


def test_a_scorer_may_fall_by_half_a_standard_deviation_of_its_scores() -> None:
    assert about(with_scores(0.6, 2.6, 1.6, 1.61)) == []  # by .3975, half of .816 is .408
    assert about(with_scores(0.58, 2.58, 1.58, 1.59)) == ["clip_score"]  # by .4175, its differences nearly alike


def test_a_fall_of_every_image_alike_is_as_certain_as_can_be() -> None:
    assert about(with_scores(0.5, 2.5, 1.5, 1.5)) == ["clip_score"]


def test_a_fall_that_may_be_chance_is_none() -> None:
    fallen = with_scores(-4.0, 5.0, 2.0, -1.0)  # mean fall 1.5, paired error 1.56: one standard error
    assert about(fallen) == []
    assert about(fallen, SETTINGS.model_copy(update={"certainty": 0.9})) == ["clip_score"]


def test_a_rise_and_images_without_a_score_are_no_fall() -> None:
    assert about(with_scores(9.0, 9.0, 9.0, 9.0)) == []
    assert about(with_scores(math.nan, math.nan, math.nan, -9.0)) == []


def test_the_dark_share_may_rise_by_so_much() -> None:
    assert about(with_images(dark_share=0.4)) == [] and about(with_images(dark_share=0.41)) == ["dark_share"]


@pytest.mark.parametrize("name", ["edge_density", "sharpness", "entropy", "diversity"])
def test_a_share_of_the_pretrained_models_must_be_left(name: str) -> None:
    assert about(with_images(**{name: IMAGES[name] * 0.5})) == []
    assert about(with_images(**{name: IMAGES[name] * 0.49})) == [name]
    assert about(with_images(**{name: 0.0}), SETTINGS.model_copy(update={name: 0.0})) == []
    assert about(with_images(**{name: math.nan})) == []


def test_the_kl_is_watched_where_the_recipe_has_a_limit() -> None:
    far = replace(BASE, kl_reference_nats=5.0)
    assert about(far) == []
    limited = SETTINGS.model_copy(update={"max_kl_nats": 4.0})
    assert about(far, limited) == ["kl"] and about(replace(BASE, kl_reference_nats=4.0), limited) == []


def test_saturation_is_an_alarm_if_the_pretrained_model_was_below_it() -> None:
    full = replace(BASE, saturation=0.96)
    settings = SETTINGS.model_copy(update={"saturation": 0.95})
    assert about(full, settings) == ["saturation"]
    assert about(replace(BASE, saturation=0.94), settings) == []
    assert about(full, SETTINGS.model_copy(update={"saturation": 0.0})) == []
    assert list(alarms(full, full, [], settings)) == []
    assert about(replace(BASE, saturation=None), settings) == []
    (alarm,) = alarms(replace(BASE, saturation=0.5), full, [], settings)
    assert alarm.says.startswith("96% of the images have the best possible reward, and 50% had: from 95% on")


def test_a_statistic_that_an_earlier_version_did_not_measure_is_no_alarm() -> None:
    old = {name: value for name, value in IMAGES.items() if name != "edge_density"}
    assert list(alarms(replace(BASE, images=old), with_images(edge_density=0.0), [], SETTINGS)) == []


def test_the_default_limits_notice_the_published_loss_of_edges_and_of_tones() -> None:
    """Edge density fell from 0.01183 to 0.00479 and entropy from 4.037 to 1.849 (Tencent-Hunyuan/UniRL, #407)."""
    base = replace(BASE, images=IMAGES | {"edge_density": 0.01183, "entropy": 4.037, "dark_share": 0.451})
    for name, value in {"edge_density": 0.00479, "entropy": 1.849}.items():
        now = replace(base, images=base.images | {name: value})
        assert [alarm.about for alarm in alarms(base, now, [], GuardTable())] == [name]


def test_an_alarm_says_its_numbers() -> None:
    (alarm,) = alarms(BASE, with_images(sharpness=20.0), [], SETTINGS)
    assert alarm.says == "sharpness is 20 and was 100: 20% of it is left, under 50%"


def judged(*versions: tuple[int, float, bool]) -> list[JudgedVersion]:
    return [
        JudgedVersion(
            version,
            VersionStats({"reward": np.array([score])}, IMAGES, means={"reward": score}),
            (Alarm("x", "x"),) if alarm else (),
        )
        for version, score, alarm in versions
    ]


def test_the_best_version_is_the_highest_without_an_alarm() -> None:
    assert best_version(judged((0, 1.0, False), (5, 2.0, False), (10, 9.0, True)), "reward") == 5
    assert best_version(judged((0, 1.0, False), (5, 1.0, False)), "reward") == 0
    assert best_version(judged((0, math.nan, False), (5, 2.0, True)), "reward") is None


def test_a_run_is_over_when_the_alarms_have_lasted() -> None:
    stop = GuardTable(on_alarm="stop", patience=2)
    assert not is_over(judged((0, 1.0, False), (5, 2.0, True)), stop)
    assert is_over(judged((0, 1.0, False), (5, 2.0, True), (10, 2.0, True)), stop)
    assert not is_over(judged((5, 2.0, True), (10, 2.0, False)), stop)
    assert not is_over(judged((5, 2.0, True)), stop)
    assert not is_over(judged((5, 2.0, True), (10, 2.0, True)), GuardTable(patience=2))
