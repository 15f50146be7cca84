"""For mkdocs: what pages link to outside docs/ comes along, so that links work here as they do beside the code.

A link such as ../configs/demo.yaml leads to the file on the code host. In the site it leads to a copy below
repository/; Markdown files there become pages, with links of their own, and a folder becomes a list of its files.
"""

from __future__ import annotations

import os
import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
ABOVE = "repository"  # where the root of the repository lies in the site
LINK = re.compile(r"(?<=\]\()(?!\w+:|#|/)([^)#\s]+)")
CODE = re.compile(r"(^```.*?^```$|`[^`\n]*`)", re.M | re.S)


def on_files(files: Files, config: Any) -> None:
    """Add what is linked to, and what that links to."""
    pages = [file for file in files.documentation_pages() if not file.src_uri.startswith(ABOVE)]
    waiting = [target for page in pages for target in _targets(_source(page.src_uri))]
    # Of what only the navigation names.
    waiting += [str(uri).removeprefix(f"{ABOVE}/") for uri in _leaves(config["nav"]) if str(uri).startswith(ABOVE)]
    while waiting:
        target = waiting.pop()
        path, uri = ROOT / target, _uri(target)
        if files.get_file_from_path(uri) or not path.exists() or target.startswith("docs/"):
            continue
        if path.is_dir():
            files.append(File.generated(config, uri, content=_listing(path)))
        else:
            files.append(File.generated(config, uri, abs_src_path=str(path)))
            if path.suffix == ".md":
                waiting += _targets(target)


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Links that leave docs/, or that a page from elsewhere has, lead to their place in the site."""
    source, here = _source(page.file.src_uri), posixpath.dirname(page.file.src_uri)

    def moved(match: re.Match[str]) -> str:
        target = _resolved(source, match[1])
        return posixpath.relpath(_uri(target), here or ".") if (ROOT / target).exists() else match[1]

    parts = CODE.split(markdown)
    return "".join(part if i % 2 else LINK.sub(moved, part) for i, part in enumerate(parts))


def _source(uri: str) -> str:
    """The path in the repository of a page of the site."""
    return uri.removeprefix(f"{ABOVE}/") if uri.startswith(f"{ABOVE}/") else f"docs/{uri}"


def _uri(target: str) -> str:
    """The path in the site of a path in the repository."""
    if target.startswith("docs/"):
        return target.removeprefix("docs/")
    return f"{ABOVE}/{target}" + ("/index.md" if (ROOT / target).is_dir() else "")


def _resolved(source: str, link: str) -> str:
    return posixpath.normpath(posixpath.join(posixpath.dirname(source), link))


def _targets(source: str) -> list[str]:
    text = CODE.sub("", (ROOT / source).read_text()) if (ROOT / source).is_file() else ""
    return [_resolved(source, link) for link in LINK.findall(text)]


def _listing(folder: Path) -> str:
    name = os.path.relpath(folder, ROOT)
    lines = sorted(path.name for path in folder.iterdir() if path.is_file() and path.name[0] not in "._")
    return f"# {name}\n\n" + "\n".join(f"- `{line}`" for line in lines) + "\n"


def _leaves(nav: Any) -> list[Any]:
    if isinstance(nav, dict | list):
        return [leaf for part in (nav.values() if isinstance(nav, dict) else nav) for leaf in _leaves(part)]
    return [nav]
