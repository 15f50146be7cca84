"""README, docs and tutorials: every block runs, every link leads somewhere, and the first page stays short.

Pages are those of the navigation in mkdocs.yml, in its order, after the README. They share one folder, in which `work/`
grows page by page. What the language of a block promises:

    sh, python    runs as written, but for flags and numbers of steps that make it small
    yaml          is YAML
    console       `$ sae-jax ...` beside what it printed: the command is parsed, with recipes and flags, not run. For
                  what needs a cluster, a bucket, a token, or minutes
    text          is not looked at, and neither is an indented block

Laws are fitted to a table with planted ones: what so small a sweep finds obeys none.
"""

from __future__ import annotations

import re
import runpy
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import pytest
import yaml

import sae_jax
from sae_jax import runs as api
from sae_jax.commands import main as cli
from sae_jax.commands import runtime
from sae_jax.pages import explore
from sae_jax.scaling import fit, table
from tests import runs
from tests.commands.test_fit import planted

ROOT = runs.ROOT
DOCS = ROOT / "docs"
README = ROOT / "README.md"
MORE = [ROOT / "CONTRIBUTING.md", ROOT / "experiments" / "README.md", ROOT / "launch" / "README.md"]
TUTORIALS = sorted((DOCS / "tutorials").glob("*.py"))
LANGUAGES = ("sh", "python", "yaml", "console", "text")
SMALL = {
    "harvest": ["--harvest.tokens=4096", "--harvest.context=64", "--harvest.heldout=heldout"],
    "train": ["--train.steps=4", "--train.decay=0", "--train.batch-size=64", "--sae.n-latents=256"],
    "evaluate": ["--tokens=256"],
    "dashboard": ["--tokens=512"],
    "collect": ["--tokens=512"],
    "explore": ["--tokens=512"],
    "sweep": shlex.split(
        "--train.batch-size=64 --sweep.held-out=512 --sweep.compute 1e8 2e8 --sweep.tokens=1280 "
        "--sweep.grid sae.n_latents=128 'sae.k=4 8'"
    ),
    "plan": ["--timeout=1"],
}


class Loader(yaml.SafeLoader):
    """mkdocs.yml may name functions of Python; none is needed here."""


def in_nav(nav: object) -> Iterator[str]:
    """The pages of a navigation, in order."""
    if isinstance(nav, str):
        yield nav
    else:
        assert isinstance(nav, dict | list)
        for part in nav.values() if isinstance(nav, dict) else nav:
            yield from in_nav(part)


NAV = [name for name in in_nav(yaml.load((ROOT / "mkdocs.yml").read_text(), Loader)["nav"]) if "/" not in name]
PAGES = [README, *(DOCS / name for name in NAV)]


def blocks(page: Path) -> list[tuple[str, str]]:
    """(language, text) of the fenced blocks of a page, in order."""
    return re.findall(r"^```(\w*)\n(.*?)^```", page.read_text(), re.M | re.S)


def commands(text: str) -> list[list[str]]:
    """The commands of a shell block, comments and continued lines taken apart."""
    lines = re.sub(r"\\\n\s*", "", text).splitlines()
    return [shlex.split(line, comments=True) for line in lines if line.strip()]


def shown(text: str) -> list[list[str]]:
    """The commands of a console block: what stands after `$ `."""
    lines = re.sub(r"\\\n\s*", "", text).splitlines()
    return [shlex.split(line.removeprefix("$ "), comments=True) for line in lines if line.startswith("$ ")]


def outputs(page: Path) -> set[str]:
    """The folders below work/ that a page's blocks write."""
    ran = "\n".join(re.sub(r"\\\n\s*", "", text) for language, text in blocks(page) if language in ("sh", "python"))
    return {
        path.rstrip("/")
        for path in re.findall(
            r"(?:--out[ =]|--report[ =]|\bout=\"|save\(\"|write_activations\(\")(work/[\w./-]+)", ran
        )
    }


@pytest.mark.slow
@pytest.mark.parametrize("pages", [PAGES[:1], pytest.param(PAGES, marks=pytest.mark.long)], ids=["the first", "all"])
@pytest.mark.usefixtures("one_device")
@pytest.mark.timeout(1800)
def test_every_block_of_every_page_runs(pages: list[Path], tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(fit, "N_DRAWS", 40)
    monkeypatch.setattr(runtime, "start_distributed", lambda: None)  # this process has devices already
    monkeypatch.setattr(explore, "wait_for", lambda server: None)  # for Ctrl-C
    for name in ("configs", "docs", "sae_jax"):
        (tmp_path / name).symlink_to(ROOT / name)
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M))
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        for page in pages:
            names: dict[str, object] = {"__name__": "page"}
            for language, text in blocks(page):
                if language == "python":
                    exec(compile(re.sub(r"\bsteps=\d+", "steps=4", text), str(page), "exec"), names)
                elif language == "yaml":
                    assert yaml.safe_load(text)
                elif language == "sh":
                    for words in commands(text):
                        if words[0] == "make":
                            assert words[1] in targets, words
                        elif words[0] == "sae-jax":
                            assert cli.main([*words[1:], *SMALL.get(words[1], [])]) == 0, (
                                page.name,
                                words,
                                capsys.readouterr().err,
                            )
                            if words[1] == "sweep":
                                table.write(words[words.index("--out") + 1], planted())
                        else:
                            assert words[0] in (".", "pip"), words
    assert (tmp_path / "work" / "site" / "index.html").exists()


REFERENCE = runpy.run_path(str(DOCS / "reference.py"))
SHOWN = [
    (page, words) for page in PAGES for language, text in blocks(page) if language == "console" for words in shown(text)
]


@pytest.mark.parametrize(("page", "words"), SHOWN, ids=[f"{page.stem}-{i}" for i, (page, _) in enumerate(SHOWN)])
def test_commands_that_are_only_shown_are_parsed(page: Path, words: list[str], monkeypatch) -> None:
    monkeypatch.chdir(ROOT)
    while "=" in words[0]:  # variables of the environment
        words = words[1:]
    if words[0] == "sae-jax":
        assert REFERENCE["parsed"](words[1:]) is not None


def test_pages_know_their_blocks() -> None:
    unknown = [
        (page.name, language, text[:40])
        for page in PAGES
        for language, text in blocks(page)
        if language not in LANGUAGES
    ]
    assert unknown == []
    # A console block without a command would be text; a command in an indented block would never be looked at.
    for page in PAGES:
        without = [text for language, text in blocks(page) if language == "console" and not shown(text)]
        assert without == [], page.name
        assert re.findall(r"^    \$ sae-jax.*", page.read_text(), re.M) == [], (
            f"{page.name}: a console block is checked"
        )


def test_two_pages_write_no_folder() -> None:
    writers: dict[str, str] = {}
    for page in PAGES:
        for path in outputs(page):
            assert path not in writers, f"{page.name} and {writers[path]} both write {path}"
            writers[path] = page.name


def test_every_page_is_in_the_navigation() -> None:
    assert sorted(NAV) == sorted(path.name for path in DOCS.glob("*.md")), "mkdocs.yml names the pages of docs/"


@pytest.mark.parametrize("name", REFERENCE["PAGES"])
def test_the_reference_is_what_the_code_says(name: str) -> None:
    assert (DOCS / name).read_text() == REFERENCE["PAGES"][name]() + REFERENCE["FOOTER"], "make reference"


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as code hosts and mkdocs make them."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.M | re.S)
    found = set()
    for heading in re.findall(r"^#+ (.*)$", text, re.M):
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).replace("`", "").strip().lower()
        found.add(re.sub(r"[^\w\- ]", "", plain).replace(" ", "-"))
    return found


def test_links_lead_somewhere() -> None:
    for page in [*PAGES, *MORE]:
        text = re.sub(r"^```.*?^```$|`[^`\n]*`", "", page.read_text(), flags=re.M | re.S)
        for link in re.findall(r"\]\(([^)\s]+)\)", text):
            if "://" in link:
                continue
            path, _, anchor = link.partition("#")
            target = (page.parent / path) if path else page
            assert target.exists(), f"{page.name}: {link}"
            assert not anchor or anchor in anchors(target), f"{page.name}: {link}"


def test_the_first_page_is_short() -> None:
    assert len(README.read_text().splitlines()) <= 200


def test_the_site_builds(tmp_path: Path) -> None:
    """Strictly: a link, an anchor or a page that nothing leads to is an error. Nothing is asked of another server."""
    pytest.importorskip("material")
    words = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    env = runs.environment() | {"NO_MKDOCS_2_WARNING": "1"}
    built = subprocess.run([*words, "-f", str(ROOT / "mkdocs.yml")], capture_output=True, text=True, env=env)
    assert built.returncode == 0, built.stderr
    for page in (tmp_path / "site").rglob("*.html"):
        fetched = re.findall(r"<(?:script|link|img)[^>]*(?:src|href)=\"(https?:[^\"]*)", page.read_text())
        assert [url for url in fetched if "example" not in url] == [], page.name


@pytest.mark.long
@pytest.mark.parametrize("path", TUTORIALS, ids=[path.stem for path in TUTORIALS])
@pytest.mark.usefixtures("one_device")
def test_a_tutorial_runs(path: Path, tmp_path: Path, monkeypatch) -> None:
    """With few steps and tokens, in a folder of its own: each stands on its own."""

    def small_sweep(data: object, *, out: str, **_: object) -> list[Any]:
        sizes = {"compute": (1e8, 2e8), "tokens": (1280,), "held_out": 512, "batch_size": 64}
        sweep(data, out=out, grid={"n_latents": [128], "k": [4, 8]}, **sizes)
        table.write(out, planted())
        return table.read(Path(out))

    sweep = api.sweep
    monkeypatch.setattr(api, "sweep", small_sweep)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(fit, "N_DRAWS", 40)
    small = re.sub(r"\bsteps=[\d_]+", "steps=8", path.read_text())
    small = re.sub(r"\btokens=\d[\d_]{5,}", "tokens=8192", small)
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        exec(compile(small, str(path), "exec"), {"__name__": "__main__"})


@pytest.mark.parametrize("path", TUTORIALS, ids=[path.stem for path in TUTORIALS])
def test_a_tutorial_becomes_a_notebook(path: Path) -> None:
    jupytext = pytest.importorskip("jupytext")
    notebook = jupytext.read(path)
    first, *cells = notebook.cells
    assert first.cell_type == "markdown"
    assert first.source.startswith("# ")
    installs = [cell for cell in cells if cell.source.startswith("%pip install")]
    assert len(installs) == 1
    for cell in cells:
        if cell.cell_type == "code" and cell not in installs:
            compile(cell.source, str(path), "exec")


def test_the_citation_names_this_version() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert (citation["version"], citation["license"]) == (sae_jax.__version__, "Apache-2.0")
