"""Clips of report.html in a real browser: they load, play in pairs, and stand still at their posters."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ray_ddpo.common.input_images import with_inputs
from ray_ddpo.common.prompts import Prompt
from ray_ddpo.common.recipe.recipe import Recipe
from ray_ddpo.deploy.commands.report.page import report_page
from tests.browser import MAY_BE_SKIPPED, browser
from tests.deploy.test_report_page import compared, run_of
from tests.tiny_clips import moving_clip

FRAMES, RATE = 24, 8.0  # three seconds, so that a pause comes before the end


@pytest.mark.system
@pytest.mark.skipif(MAY_BE_SKIPPED, reason="there is no Chromium here (Debian: apt-get install chromium)")
def test_clips_play_in_pairs_and_all_at_once(recipe: Recipe, tmp_path: Path) -> None:
    scores = {"jpeg_compressibility": [-3.0, -2.0]}
    before, after = (np.stack([moving_clip(kind + 2 * row, FRAMES) for row in range(2)]) for kind in range(2))
    comparison = replace(compared(scores, scores), before=before, after=after, frame_rate=RATE)
    Image.fromarray(before[0, 0]).save(tmp_path / "first.png")
    inputs = with_inputs({"image": "first.png"}, {"image": "image"}, tmp_path)
    begun = replace(comparison.chosen, prompts=tuple(Prompt(each.text, inputs) for each in comparison.chosen.prompts))
    path = tmp_path / "report.html"
    path.write_text(report_page(run_of(recipe), comparison))
    with browser(tmp_path / "chromium") as page:
        page.open(path)
        gallery = "[...document.querySelectorAll('#gallery video')]"
        page.wait_for(f"{gallery}.every((clip) => clip.readyState === 4)", "the clips")
        shown = page.evaluate(
            f"{gallery}.map((clip) => [clip.duration, clip.videoWidth, clip.videoHeight, clip.paused])"
        )
        assert shown == [[FRAMES / RATE, 120, 80, True]] * 4
        first = page.evaluate(f"{gallery}[0].play().then(() => {gallery}.map((clip) => clip.paused))")
        assert first == [False, False, True, True]  # the other clip of the pair plays too
        page.click("#play")
        page.wait_for(f"{gallery}.every((clip) => clip.paused)", "a pause")
        page.click("#play")
        page.wait_for(f"{gallery}.every((clip) => clip.currentTime > 0 && !clip.paused)", "all clips")
        assert page.evaluate("document.querySelector('#play').textContent") == "Pause all"
        assert page.complaints == []
        page.resize(390, 844)
        assert page.evaluate("document.documentElement.scrollWidth") == 390
        path.write_text(report_page(run_of(recipe), replace(comparison, chosen=begun)))
        for width in (1100, 390):
            page.resize(width, 844)
            page.open(path)
            sides = "[...document.querySelectorAll('.pair .input, .pair video')].map((each) => each.clientWidth)"
            assert len(shown := page.evaluate(sides)) == 3 * 4 and max(shown) - min(shown) <= 4  # the gaps between them
