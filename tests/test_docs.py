"""README and docs: every block runs, every link leads somewhere, and the first page stays short.

All run as written, but for flags and numbers of steps that make them small. They share one folder, in which `work/`
grows page by page. Laws are fitted to a table with planted ones: what so small a sweep finds obeys none.
"""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import jax
import pytest
import yaml

from sae_jax.commands import main as cli
from sae_jax.commands import runtime
from sae_jax.pages import explore
from sae_jax.scaling import fit, table
from tests import runs
from tests.commands.test_fit import planted

ROOT = runs.ROOT
PAGES = [ROOT / "README.md"]
PAGES += [
    ROOT / "docs" / f"{name}.md" for name in ("data", "models", "variants", "python", "metrics", "latents", "dashboard")
]
PAGES += [
    ROOT / "docs" / f"{name}.md"
    for name in ("devices", "scaling", "explain", "probing", "interchange", "publish", "explore")
]
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


def blocks(page: Path) -> list[tuple[str, str]]:
    """(language, text) of the fenced blocks of a page, in order."""
    return re.findall(r"^```(\w+)\n(.*?)^```", page.read_text(), re.M | re.S)


def commands(text: str) -> list[list[str]]:
    """The commands of a shell block, comments and continued lines taken apart."""
    lines = re.sub(r"\\\n\s*", "", text).splitlines()
    return [shlex.split(line, comments=True) for line in lines if line.strip()]


@pytest.mark.slow
@pytest.mark.parametrize("pages", [PAGES[:1], pytest.param(PAGES, marks=pytest.mark.long)], ids=["the first", "all"])
@pytest.mark.usefixtures("one_device")
@pytest.mark.timeout(1200)
def test_every_block_of_every_page_runs(pages: list[Path], tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(fit, "N_DRAWS", 40)
    monkeypatch.setattr(runtime, "start_distributed", lambda: None)  # this process has devices already
    monkeypatch.setattr(explore, "wait_for", lambda server: None)  # for Ctrl-C
    for name in ("configs", "docs", "sae_jax"):
        (tmp_path / name).symlink_to(ROOT / name)
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.M))
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        for page in pages:
            names: dict[str, object] = {"__name__": "page"}
            for language, text in blocks(page):
                if language == "python":
                    exec(compile(re.sub(r"\bsteps=\d+", "steps=4", text), str(page), "exec"), names)
                elif language == "yaml":
                    assert yaml.safe_load(text)
                else:
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


def test_links_lead_somewhere() -> None:
    for page in [*PAGES, ROOT / "CONTRIBUTING.md", ROOT / "experiments" / "README.md"]:
        for link in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
            if "://" not in link:
                assert (page.parent / link).exists(), f"{page.name}: {link}"


def test_the_first_page_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 200
