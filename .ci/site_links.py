"""Hooks of mkdocs: pages from outside docs/, and links that lead from a page to other files of the repository."""

import os.path
import re
from pathlib import Path
from typing import Any

from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File

OUTSIDE = {"cluster.md": "deploy/cluster/README.md", "changelog.md": "CHANGELOG.md"}  # pages by their name in the site
HOME = "README.md"  # a link to the README leads to the site's first page
LINK = re.compile(r"(?<!!)\[([^\]\n]+)\]\(([^)\s:#]+)(#[^)\s]*)?\)")
CODE = re.compile(r"`[^`\n]+`")


def on_files(files: Any, config: Any) -> Any:
    """Add the pages that are outside docs/."""
    root = Path(config.config_file_path).parent
    for name, source in OUTSIDE.items():
        files.append(File.generated(config, name, abs_src_path=str(root / source)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    r"""Rewrite a page's links to files that are no pages of the site, and `\|` in the code of tables.

    Without a `repo_url` such a link becomes the file's path. Python-Markdown shows the backslash, which GitHub needs.

    Raises:
        PluginError: A link leads to a file that does not exist.
    """
    root = Path(config.config_file_path).resolve().parent
    docs = Path(config.docs_dir).resolve()
    source = page.file.src_uri
    folder = (root / OUTSIDE[source] if source in OUTSIDE else docs / source).parent
    pages = {str(root / path): name for name, path in OUTSIDE.items()} | {str(root / HOME): "index.md"}

    def rewritten(link: re.Match[str]) -> str:
        text, target, anchor = link[1], link[2], link[3] or ""
        path = os.path.normpath(folder / target)
        if not os.path.exists(path) and path not in pages:
            raise PluginError(f"{source} links to {target}, which does not exist")
        inside = pages.get(path, os.path.relpath(path, docs))
        file = files.get_file_from_path(inside)
        if file and not file.inclusion.is_excluded():
            return f"[{text}]({os.path.relpath(inside, os.path.dirname(source) or '.')}{anchor})"
        name = os.path.relpath(path, root)
        if config.repo_url:
            return f"[{text}]({config.repo_url.rstrip('/')}/blob/main/{name}{anchor})"
        return f"`{name}`" if name in text else f"{text} (`{name}`)"

    lines = LINK.sub(rewritten, markdown).split("\n")
    rows = [
        CODE.sub(lambda code: code[0].replace(r"\|", "|"), line) if line.startswith("|") else line for line in lines
    ]
    return "\n".join(rows)
