"""Ray's dashboard in a real browser with the cluster's token: text and screenshots of its pages.

`python -m tests.system.dashboard_pages http://127.0.0.1:8265 FOLDER` writes them to FOLDER. RAY_AUTH_TOKEN holds the token.
"""

import os
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from tests.browser import Page, browser

DESKTOP = (1440, 900)


@dataclass(frozen=True)
class LookedAt:
    """A page as a person has it."""

    text: str
    image: bytes  # PNG
    found: bool  # whether the words that were looked for came


@dataclass(frozen=True)
class Wanted:
    """A page by its path behind `#/`, the pattern to wait for, and the section to open first, if any."""

    path: str
    words: str
    section: str = ""


def looked_at(api: str, token: str, wanted: dict[str, Wanted], folder: Path) -> dict[str, LookedAt]:
    """Pages by any name. Their images are left in `folder`."""
    with tempfile.TemporaryDirectory() as profile, browser(Path(profile)) as page:
        page.resize(*DESKTOP)
        log_in(page, api, token)
        pages = {name: _look(page, api, each) for name, each in wanted.items()}
    for name, looked in pages.items():
        (folder / f"{name}.png").write_bytes(looked.image)
    return pages


def log_in(page: Page, api: str, token: str) -> None:
    """As the dashboard's own form does: it hands the token in, and is given a cookie that no script can read."""
    page.visit(f"{api}/")
    status = page.evaluate(
        f"fetch('/api/authenticate', {{method: 'POST', headers: {{Authorization: 'Bearer {token}'}}}})"
        ".then((a) => a.status)"
    )
    assert status == 200, f"the dashboard answers {status} to its token"


def _look(page: Page, api: str, wanted: Wanted) -> LookedAt:
    page.visit("about:blank")  # or another page of the same program would still be there
    page.visit(f"{api}/#/{wanted.path}")
    found = True
    try:
        if wanted.section:
            page.wait_for(f"document.body.innerText.includes({wanted.section!r})", wanted.section)
            headings = f"[...document.querySelectorAll('*')].filter((e) => e.innerText === {wanted.section!r})"
            page.evaluate(f"{headings}.pop().click()")  # the innermost
        page.wait_for(f"new RegExp({wanted.words!r}).test(document.body.innerText)", wanted.words)
    except AssertionError:
        found = False
    return LookedAt(page.evaluate("document.body.innerText"), page.screenshot(), found)


def main(api: str, folder: Path) -> None:
    """PageImages of the two pages that list everything."""
    folder.mkdir(parents=True, exist_ok=True)
    looked_at(
        api,
        os.environ["RAY_AUTH_TOKEN"],
        {"jobs": Wanted("jobs", "Submission ID"), "actors": Wanted("actors", "Actor ID")},
        folder,
    )


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
