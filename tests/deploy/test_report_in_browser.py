"""report.html in a real browser: desktop, phone, dark mode, print."""

import io
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest
from PIL import Image

from ray_ddpo import cli
from ray_ddpo.common.recipe.recipe import Recipe
from ray_ddpo.train import run_training
from tests.browser import MAY_BE_SKIPPED, Page, browser
from tests.system.disturbances import alive
from tests.tiny_pipeline import save_tiny_pipeline

pytestmark = [
    pytest.mark.system,
    pytest.mark.skipif(MAY_BE_SKIPPED, reason="there is no Chromium here (Debian: apt-get install chromium)"),
]
LONG = "a photograph of " + "very " * 40 + "supercalifragilisticexpialidocious" * 4
PROMPTS = ["cat", "dog", "<script>document.title = 'taken over'</script>", LONG]
PROBE = {"name": "jpeg_compressibility", "label": "probe"}
SIZES = {"desktop": (1280, 900), "phone": (390, 844)}


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of a small run of three rewards and scorers."""
    folder = tmp_path_factory.mktemp("report")
    tables = {
        "name": "tiny",
        "output_dir": str(folder / "runs"),
        "rounds": 2,
        "policy": {"name": "stable_diffusion", "model": str(save_tiny_pipeline(folder / "model"))},
        "prompts": {"name": "texts", "texts": PROMPTS},
        "sampling": {"num_steps": 4, "guidance_scale": 3.0, "batch_size": 4, "batches_per_round": 2},
        "rewards": [
            {"name": "jpeg_compressibility", "label": "small", "weight": 2.0},
            {"name": "jpeg_incompressibility", "weight": 0.5, "floor": 0.5},
        ],
        "algorithm": {"name": "ddpo_is", "clip_range": 1e-3},
        "learner": {"batch_size": 4, "micro_batch_size": 8, "learning_rate": 1e-3},
        "evaluation": {"every": 1, "images": 8, "batch_size": 4, "scorers": [PROBE]},
        "guard": {"max_kl_nats": 1e-9},
    }
    recipe = Recipe.parse(tables)
    run_training(recipe, serial=True)
    assert cli.main(["report", recipe.run_path()]) == 0
    return Path(recipe.run_path()) / "report" / "report.html"


@pytest.fixture(scope="module")
def page(report: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    with browser(tmp_path_factory.mktemp("chromium")) as tab:
        yield tab


@pytest.fixture(params=SIZES)
def opened(request: pytest.FixtureRequest, page: Page, report: Path) -> Page:
    page.resize(*SIZES[request.param])
    page.complaints.clear()
    page.requests.clear()
    page.open(report)
    return page


def test_it_opens_without_a_complaint_and_asks_for_nothing_but_itself(opened: Page, report: Path) -> None:
    assert opened.evaluate("document.title") == "tiny: what the run has changed"
    assert opened.evaluate("[...document.images].every((image) => image.complete && image.naturalWidth > 0)")
    assert opened.complaints == []
    assert {url for url in opened.requests if not url.startswith("data:")} == {report.as_uri()}


def test_a_foreign_request_or_script_is_refused(opened: Page) -> None:
    opened.evaluate("void fetch('https://example.org/').catch(() => null)")
    opened.evaluate(
        "Object.assign(document.body.appendChild(document.createElement('script')), {textContent: 'stray = 1'})"
    )
    assert opened.evaluate("typeof stray") == "undefined"
    refused = [complaint for complaint in opened.complaints if "Content Security Policy" in complaint]
    assert any("example.org" in complaint for complaint in refused)
    assert any("inline script" in complaint for complaint in refused)


def test_nothing_but_tables_is_wider_than_the_screen(opened: Page) -> None:
    # A phone shows a wider page smaller, so the width is that of the screen and not of what is shown.
    assert opened.evaluate("document.documentElement.scrollWidth") == opened.width
    wider = f"(element) => element.getBoundingClientRect().right > {opened.width + 1} && !element.closest('.scroll')"
    assert opened.evaluate(f"[...document.body.querySelectorAll('*')].filter({wider}).map((e) => e.outerHTML)") == []


def seen(page: Page, frames: str) -> float:
    """From where on, in percent of its width, the image after is shown."""
    clip = page.evaluate(f"getComputedStyle(document.querySelector('{frames} .after')).clipPath")
    return float(clip.removeprefix("inset(").removesuffix(")").split()[-1].rstrip("%px"))


def test_the_slider_moves_by_pointer_by_key_and_all_at_once(opened: Page) -> None:
    first, last = "#gallery .pair:first-child", "#gallery .pair:last-child"
    assert (seen(opened, first), seen(opened, last)) == (50, 50)
    opened.click(f"{first} .frames", at=(0.25, 0.5))
    assert seen(opened, first) == pytest.approx(25, abs=1) and seen(opened, last) == 50
    opened.evaluate(f"document.querySelector('{first} input').focus()")
    before = seen(opened, first)
    for kind in ("keyDown", "keyUp"):
        opened.call("Input.dispatchKeyEvent", type=kind, key="ArrowRight", code="ArrowRight", windowsVirtualKeyCode=39)
    assert seen(opened, first) == pytest.approx(before - 1)  # towards the image after
    opened.click("#all", at=(0.999, 0.5))
    assert seen(opened, first) == seen(opened, last) == 0


def test_what_was_seen_along_the_way_can_be_read(opened: Page) -> None:
    """Versions 0, 1 and 2; the last two have an alarm about the KL."""
    assert opened.evaluate("document.querySelectorAll('#evaluation .chart').length") >= 6
    rows = "[...document.querySelectorAll('#evaluation .sortable tbody tr')]"
    assert opened.evaluate(f"{rows}.map((row) => row.innerText.split('\\t').slice(0, 2))") == [["1", "kl"], ["2", "kl"]]
    outside = """[...document.querySelectorAll('.chart text')].filter((text) => {
        const [inner, outer] = [text, text.closest('svg')].map((element) => element.getBoundingClientRect());
        return inner.left < outer.left - 1 || inner.right > outer.right + 1;
    }).map((text) => text.textContent)"""
    assert opened.evaluate(outside) == []


def test_a_table_sorts_by_a_click_on_its_head(opened: Page) -> None:
    table = "#prompts table"

    def column(number: int) -> list[str]:
        cells = (
            f"[...document.querySelectorAll('{table} tbody')[0].rows].map((row) => row.cells[{number}].dataset.value)"
        )
        return opened.evaluate(cells)

    opened.evaluate(f"document.querySelector('{table} th:nth-child(3) button').click()")
    values = [float(value) for value in column(2)]
    assert values == sorted(values, reverse=True) and len(set(values)) > 1
    opened.evaluate(f"document.querySelector('{table} th:nth-child(3) button').click()")
    assert [float(value) for value in column(2)] == sorted(values)
    opened.click(f"{table} th:nth-child(1) button")
    assert opened.evaluate(f"document.querySelector('{table} th').ariaSort") == "ascending"
    assert column(0)[-2:] == ["cat", "dog"] and set(column(0)) == set(PROMPTS)


@pytest.mark.parametrize("dark", [False, True])
def test_it_is_dark_where_the_system_is(opened: Page, dark: bool) -> None:
    opened.set_dark(dark)
    pixels = np.asarray(Image.open(io.BytesIO(opened.screenshot())).convert("L"))
    assert (np.median(pixels) < 60) == dark
    ink, paper = (opened.evaluate(f"getComputedStyle(document.body).{name}") for name in ("color", "backgroundColor"))
    brightness = [sum(map(int, colour[4:-1].split(","))) / 3 for colour in (ink, paper)]
    assert abs(brightness[0] - brightness[1]) > 150
    opened.set_dark(False)


def test_on_paper_the_images_stand_side_by_side_and_light(opened: Page) -> None:
    opened.set_dark(True)
    media = [{"name": "prefers-color-scheme", "value": "dark"}]
    opened.call("Emulation.setEmulatedMedia", media="print", features=media)
    boxes = "['before', 'after'].map((kind) => document.querySelector(`#gallery .${kind}`).getBoundingClientRect().x)"
    left, right = opened.evaluate(boxes)
    assert (
        right > left
        and opened.evaluate("getComputedStyle(document.querySelector('#gallery .after')).clipPath") == "none"
    )
    assert opened.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert opened.printed().startswith(b"%PDF-")
    opened.call("Emulation.setEmulatedMedia", media="", features=[])


def test_without_its_script_the_images_stand_side_by_side(opened: Page, report: Path) -> None:
    opened.call("Emulation.setScriptExecutionDisabled", value=True)
    try:
        opened.call("Page.reload")
        opened.open(report)
        boxes = (
            "['before', 'after'].map((kind) => document.querySelector(`#gallery .${kind}`).getBoundingClientRect().x)"
        )
        left, right = opened.evaluate(boxes)
        assert right > left and opened.evaluate("document.querySelector('.controls').offsetHeight") == 0
    finally:
        opened.call("Emulation.setScriptExecutionDisabled", value=False)


def test_nothing_of_a_browser_is_left_to_write_into_its_profile(tmp_path: Path) -> None:
    before = psutil.Process().children(recursive=True)
    with browser(tmp_path) as tab:
        tab.visit("about:blank")
        family = [each for each in psutil.Process().children(recursive=True) if each not in before]
    assert len(family) > 2 and alive(family) == []
