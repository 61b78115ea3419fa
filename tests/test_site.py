"""The documentation site is built with strict links, asks no other host for anything, and fits a phone."""

import functools
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from tests.browser import MAY_BE_SKIPPED, Page, browser

ROOT = Path(__file__).parents[1]
PHONE, DESKTOP = (390, 844), (1280, 1000)
WIDE_PAGES = ("index.html", "rewards.html", "performance.html", "verification.html", "api.html")
LOADED = re.compile(
    r"""<(?:script|img|iframe|source)[^>]*\bsrc=["']?(https?:[^"' >]*)|<link[^>]*\bhref=["']?(https?:[^"' >]*)"""
)

pytestmark = pytest.mark.thorough


class QuietHandler(SimpleHTTPRequestHandler):
    """A handler that logs nothing."""

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", folder]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.fixture(scope="module")
def address(site: Path) -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(QuietHandler, directory=site)) as server:
        threading.Thread(target=server.serve_forever).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    with browser(tmp_path_factory.mktemp("profile")) as page:
        yield page


def test_every_page_is_in_the_site(site: Path) -> None:
    names = {path.stem for path in (ROOT / "docs").glob("*.md")}
    assert (names | {"cluster", "changelog"}) - {path.stem for path in site.glob("*.html")} == set()


def test_links_between_pages_and_to_other_files_are_rewritten(site: Path) -> None:
    assert 'href="cluster.html"' in (site / "index.html").read_text(encoding="utf-8")
    assert 'href="performance.html#' in (site / "cluster.html").read_text(encoding="utf-8")
    assert not [path.name for path in site.glob("*.html") if r"\|" in path.read_text(encoding="utf-8")]


def test_no_page_loads_anything_from_another_host(site: Path) -> None:
    found = {path.name: LOADED.findall(path.read_text(encoding="utf-8")) for path in site.rglob("*.html")}
    assert {name: urls for name, urls in found.items() if urls} == {}
    styles = [
        path for path in site.rglob("*.css") if re.search(r"url\(['\"]?https?:", path.read_text(encoding="utf-8"))
    ]
    assert styles == []


def test_the_api_page_documents_the_base_classes(site: Path) -> None:
    text = (site / "api.html").read_text(encoding="utf-8")
    for name in ("Recipe", "train", "Reward", "PromptSource", "Policy", "Transition", "Algorithm", "Tracker"):
        assert re.search(rf'id="ray_ddpo\.[a-z_.]*{name}"', text), name


@pytest.mark.skipif(MAY_BE_SKIPPED, reason="there is no Chromium here")
@pytest.mark.parametrize("name", WIDE_PAGES)
def test_a_page_fits_a_desktop_and_a_phone_without_errors(name: str, address: str, page: Page) -> None:
    page.complaints.clear()
    page.requests.clear()
    for width, height in (DESKTOP, PHONE):
        page.resize(width, height)
        page.visit(f"{address}/{name}")
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        broken = "[...document.images].filter(image => image.complete && !image.naturalWidth).map(image => image.src)"
        assert page.evaluate(broken) == []
    assert page.complaints == []
    assert [url for url in page.requests if not url.startswith((address, "data:", "blob:"))] == []


@pytest.mark.skipif(MAY_BE_SKIPPED, reason="there is no Chromium here")
def test_search_finds_a_page_by_a_term(address: str, page: Page) -> None:
    page.resize(*DESKTOP)
    page.visit(f"{address}/index.html?q=fingerprint")
    page.wait_for("!!document.querySelector('.md-search-result__item a')", "a result")
    assert page.evaluate("document.querySelector('.md-search').getBoundingClientRect().width") > 0
