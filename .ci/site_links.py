"""A hook of mkdocs: links from a page to files outside docs/ lead to the repository, or become their path without one."""

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.exceptions import PluginError

LINK = re.compile(r"(?<!!)\[([^\]\n]+)\]\(([^)\s:#]+)(#[^)\s]*)?\)")


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Rewrite a page's links to files of the repository that are no pages of the site.

    Raises:
        PluginError: A link leads to a file that does not exist.
    """
    docs = Path(config.docs_dir)
    root = Path(config.config_file_path).parent

    def rewritten(link: re.Match[str]) -> str:
        text, target, anchor = link[1], link[2], link[3] or ""
        inside = posixpath.normpath(posixpath.join(posixpath.dirname(page.file.src_uri), target))
        file = files.get_file_from_path(inside)
        if file and not file.inclusion.is_excluded():
            return link[0]
        path = (docs / inside).resolve()
        if not path.exists():
            raise PluginError(f"{page.file.src_uri} links to {target}, which does not exist")
        name = path.relative_to(root.resolve()).as_posix()
        if config.repo_url:
            return f"[{text}]({config.repo_url.rstrip('/')}/blob/main/{name}{anchor})"
        return f"`{name}`" if name in text else f"{text} (`{name}`)"

    return LINK.sub(rewritten, markdown)
