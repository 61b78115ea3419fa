"""Write suite.html: tables by category with confidence intervals, changes, the best weights, and images."""

import base64
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from ray_ddpo.common.clips import ImageOrClip, is_clip, poster
from ray_ddpo.common.run_storage.png import png
from ray_ddpo.common.video_files import playable
from ray_ddpo.deploy.commands.report.image_pairs import EDGE, clip_uri
from ray_ddpo.deploy.commands.report.numbers import number, signed
from ray_ddpo.deploy.evaluation.categories import category
from ray_ddpo.deploy.evaluation.eval_result import EvalResult

HERE = Path(__file__).parent
STYLES = HERE.parent / "report" / "page.css"
MOST_CATEGORIES = 16  # of which images are shown
IMAGES_EACH = 3


def suite_page(told: dict[str, Any], settings: str, found: dict[str, EvalResult]) -> str:
    """Return one self-contained HTML text. Everything from prompts and weights is escaped.

    Args:
        told: what suite.json holds.
        settings: how images were sampled, in words.
        found: the results by weights; the same prompts and seeds in each.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(HERE), autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True
    )
    environment.filters |= {"number": number, "signed": signed}
    template = environment.get_template("suite.html.jinja")
    styles = Markup(STYLES.read_text(encoding="utf-8"))  # not escaped: it is our own file
    return template.render(
        told=told, settings=settings, shown=shown_images(found, list(told["scores"])), locations=list(found), css=styles
    )


def shown_uri(pixels: ImageOrClip) -> str:
    """Encode an image without loss, or a clip's poster at the size of its file, as a data URI."""
    shown = poster(playable(pixels, EDGE)) if is_clip(pixels) else pixels
    return "data:image/png;base64," + base64.b64encode(png(shown)).decode("ascii")


def shown_images(found: dict[str, EvalResult], scorers: list[str]) -> list[dict[str, Any]]:
    """Return the first images, or clips, of each category: prompt, category, and one for each of the weights."""
    prompts = next(iter(found.values())).prompts
    rows: dict[str, list[int]] = {}
    for row, prompt in enumerate(prompts):
        texts = [prompts[other].text for other in rows.get(category(prompt), ())]
        if len(texts) < IMAGES_EACH and prompt.text not in texts:
            rows.setdefault(category(prompt), []).append(row)
    shown = [row for of_category in list(rows.values())[:MOST_CATEGORIES] for row in of_category]
    return [
        {
            "category": category(prompts[row]),
            "prompt": prompts[row].text,
            "images": [
                {
                    "uri": shown_uri(result.pixels[row]),
                    "clip": clip_uri(result.pixels[row], result.frame_rate),
                    "scores": ", ".join(number(float(result.scores[name][row])) for name in scorers),
                }
                for result in found.values()
            ],
        }
        for row in shown
    ]
