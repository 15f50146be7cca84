"""Reports hold the numbers of the files they are made from, stand alone, and show hostile names as text."""

from __future__ import annotations

import base64
import dataclasses
import html
import json
import re
import shutil

import numpy as np
import pytest

import sae_jax
from sae_jax import storage
from sae_jax.commands.main import main
from sae_jax.pages.reports.curves import MOST, charts
from sae_jax.scaling import fit, table
from sae_jax.types import UsageError, UserError
from tests.commands.test_fit import planted
from tests.pages.test_dashboard import browse, needs_browser

HOSTILE = "<script>document.documentElement.dataset.pwned=1</script>"


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A run of two members, and one by itself, which is one of them as it is in its own folder."""
    folder = tmp_path_factory.mktemp("runs")
    rows = np.random.default_rng(0).normal(size=(512, 8)).astype(np.float32)
    settings = {"n_latents": 16, "steps": 6, "batch_size": 64, "log_every": 1, "out": folder / "two"}
    sae_jax.train_members(rows, {"k2": {"k": 2}, "k3": {}}, k=3, **settings)
    shutil.copytree(folder / "two" / "members" / "k3", folder / "one")
    shutil.copy(folder / "two" / "attempts.jsonl", folder / "one")
    return folder


@pytest.fixture
def run(runs, tmp_path):
    """A copy to break."""
    return shutil.copytree(runs / "one", tmp_path / "one")


def evaluation(folder, fvu=0.25, **more):
    document = {"step": 6, "sites": {"x": ["rows"], "y": ["rows"]}, "text": None, "fvu": fvu}
    document |= {"intervals": {"fvu": [fvu - 0.01, fvu + 0.01]}, **more}
    storage.write_json(folder / "evaluation.json", storage.sealed(document))


def read(path):
    """The page, and its text. It refers to nothing outside."""
    page = path.read_text()
    assert not re.search(r'(src|href)="(?!data:|[\w.][^":]*\.html")', page)
    assert re.findall("<script>", page) == ["<script>"]
    for alt in re.findall(r'<img[^>]* alt="([^"]*)"', page):
        assert len(alt) > 20
    return page, " ".join(html.unescape(re.sub("<[^>]*>", " ", page.partition("<main>")[2])).split())


def images(page):
    return [base64.b64decode(data).decode() for data in re.findall(r"data:image/svg\+xml;base64,([^\"]*)", page)]


def test_a_run(run, capsys):
    evaluation(run, 0.25, kl=0.5)
    assert main(["report", str(run)]) == 0
    assert str(run / "report.html") in "".join(capsys.readouterr())
    page, text = read(run / "report.html")
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert "acts · 16 latents · k = 3 · topk" in text
    assert f"{rows[-1]['fvu']:.3g} at 384" in text
    assert "0.2500 [0.2400, 0.2600]" in text
    assert "divergence of the predictions" in text  # in the list, not on hover alone
    assert "dead latents: 0 throughout." in text
    assert "Warnings" not in text
    assert 'aria-label="Warnings"' not in page
    assert "train.batch_size 64" in text
    assert "0 0 6 finished 1" in text
    assert len(images(page)) >= 5
    for svg in images(page):
        assert "prefers-color-scheme" in svg
        assert "#000000" not in svg


def test_a_run_of_members_and_dictionaries_side_by_side(runs, tmp_path):
    path = sae_jax.report(runs / "two", out=tmp_path / "two.html")
    page, text = read(path)
    assert "k2 topk 16 2 384" in text
    assert "k3 topk 16 3 384" in text
    assert any("k2" in svg and "k3" in svg for svg in images(page))
    sae_jax.load(runs / "one").save(tmp_path / "saved")
    evaluation(tmp_path / "saved", 0.125)
    page, text = read(sae_jax.report(runs / "one", tmp_path / "saved", out=tmp_path / "both.html"))
    assert "not measured, so left out of what was: one" in text
    assert "0.1250 [0.1150, 0.1350]" in text
    _, text = read(sae_jax.report(tmp_path / "saved"))
    assert "tokens trained on 384" in text
    assert "0.1250 [0.1150, 0.1350]" in text


def test_what_is_unfinished_or_damaged_is_said(run):
    config = json.loads((run / "config.json").read_text())
    config["train"]["steps"] = 10
    del config[storage.digests.SEAL]
    storage.write_json(run / "config.json", storage.sealed(config))
    _, text = read(sae_jax.report(run))
    assert "the newest checkpoint is of step 6 of 10" in text
    (run / "evaluation.json").write_text('{"fvu": 0.1, "xxh3_64_of_all_else": "0000"}')
    with (run / "metrics.jsonl").open("a") as log:
        log.write('{"step": 7, "fvu": null, "tokens": 448}\nbroken\n\n')
    for path in (run / "checkpoints").glob("*/sae/**/c/*"):
        path.write_bytes(b"") if path.is_file() else None
    _, text = read(sae_jax.report(run))
    assert "evaluation.json is left out" in text
    assert "1 of 8 lines are damaged" in text
    assert "from step 7 on, values were not finite" in text
    shutil.rmtree(run / "checkpoints")
    (run / "metrics.jsonl").unlink()
    _, text = read(sae_jax.report(run))
    assert "no checkpoint of 10 steps yet" in text
    assert "no step is logged" in text
    (run / "config.json").write_text("{}")
    with pytest.raises(UserError, match="config"):
        sae_jax.report(run)


def test_a_damaged_checkpoint_is_said(run):
    (largest,) = sorted((p for p in (run / "checkpoints").rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)[
        -1:
    ]
    largest.write_bytes(b"x" * largest.stat().st_size)
    _, text = read(sae_jax.report(run))
    assert "the checkpoint of step 6 is damaged" in text
    assert str(run) not in text


@pytest.fixture(scope="module")
def sweep(tmp_path_factory):
    """A table that obeys planted laws, of which one member is unfinished and one is missing."""
    folder = tmp_path_factory.mktemp("sweeps") / "planted"
    points = [dataclasses.replace(point, steps=point.tokens) for point in planted() if point.lr == 1e-3]
    short = points[0].name
    points = [dataclasses.replace(p, converged=False) if p.name == short else p for p in points]
    table.write(folder, points)
    marks: dict[str, list[int]] = {}
    for point in points:
        marks.setdefault(point.name, []).append(point.tokens)
    plan = {name: {"marks": steps} for name, steps in marks.items()}
    plan[short]["marks"].append(10**9)
    plan[HOSTILE] = {"marks": [5]}
    storage.write_json(folder / "sweep.json", storage.sealed({"data": "0", "sweep": {}, "members": plan}))
    return folder


def test_a_sweep(sweep, tmp_path, monkeypatch):
    monkeypatch.setattr(fit, "N_DRAWS", 20)
    page, text = read(sae_jax.report(sweep, out=tmp_path / "sweep.html"))
    points = table.read(sweep)
    names = {point.name for point in points}
    rows = re.findall(r'<th scope="row">([^<]*)</th>', page)
    assert names <= set(rows)
    assert f"1 of {len(names) + 1} members have no point: they failed or are to come: {HOSTILE}" in text
    assert "1 members lack their last points" in text
    (_, exponent, low, high) = re.search(r"FVU of width n.*?exponent (([\d.]+) ([\d.]+) to ([\d.]+))", text).groups()
    assert float(low) <= float(exponent) <= float(high)
    assert float(exponent) == pytest.approx(0.5, abs=0.05)  # as it was planted
    assert "At the largest width of the points, 8,192 latents, FVU by the law is 0.0" in text
    assert "What do width and active latents buy together?" in text
    assert len(images(page)) >= 4
    keys = [float(key) for key in re.findall(r'data-key="([^"]*)"', page)]
    assert {point.fvu for point in points if point.k == 4} & set(keys)


@pytest.mark.slow
def test_a_fit_that_says_something_else_is_said(sweep, tmp_path, monkeypatch):
    monkeypatch.setattr(fit, "N_DRAWS", 20)
    folder = shutil.copytree(sweep, tmp_path / "fitted")
    assert main(["fit", str(folder), "--k=16"]) == 0
    _, text = read(sae_jax.report(folder))
    assert "k = 16:" in text
    assert "fit.json has another law" not in text
    content = json.loads((folder / "fit.json").read_text())
    content["latents"]["exponent"] += 0.1
    del content[storage.digests.SEAL]
    storage.write_json(folder / "fit.json", storage.sealed(content))
    _, text = read(sae_jax.report(folder))
    assert "fit.json has another law of latents than shown here" in text


def test_names_and_labels_stay_text_and_folders_of_the_author_stay_out(run, tmp_path):
    named = run.rename(run.with_name(HOSTILE.replace("/", "\u2215") + " $x_$ & co"))
    evaluation(named, text="base=/home/someone/private.txt", left_out={HOSTILE: "see /home/someone/x"})
    other = shutil.copytree(named, tmp_path / "other")
    for paths in ([named], [named, other]):
        page, text = read(sae_jax.report(*paths, out=tmp_path / "page.html"))
        assert "dataset.pwned" in text
        assert HOSTILE in text
        assert "/home/someone" not in page
        assert "private.txt" in page
        assert all("<script" not in svg for svg in images(page))


def test_a_dashboard_beside_is_led_to(run, tmp_path):
    about = "acts · 16 latents · k = 3 · topk"
    for name, line in (("mine", about), ("not mine", "acts · 32 latents")):
        (tmp_path / name).mkdir()
        head = '<meta name="generator" content="sae_jax dashboard">'
        (tmp_path / name / "index.html").write_text(
            f'{head}<span class="about">{line.replace(" = ", chr(160) + "=" + chr(160))}</span>'
        )
    page, _ = read(sae_jax.report(run))
    assert 'href="../mine/index.html"' in page
    assert "not%20mine" not in page


def test_long_logs_are_drawn_in_stretches_and_end_where_they_end():
    rows = [{"step": i, "tokens": 10 * i, "fvu": 1 / i, "odd_name": -float(i)} for i in range(1, 50_000)]
    rows[100]["fvu"] = None
    (fvu, odd), constant = charts({"": rows})
    assert f"More than {MOST} steps are logged" in fvu.note
    assert f"{1 / 49_999:.3g} at 499,990" in fvu.note
    assert odd.caption == "odd name"
    assert len(base64.b64decode(fvu.source.partition(",")[2])) < 200_000
    assert constant == []


@pytest.mark.parametrize(
    ("paths", "said"),
    [
        ([], "given nothing"),
        (["missing"], "does not exist"),
        (["empty"], "is no run"),
        (["one", "empty"], "say where it goes"),
    ],
)
def test_what_is_none_of_them_is_refused(paths, said, runs, tmp_path, monkeypatch):
    shutil.copytree(runs / "one", tmp_path / "one")
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match=said):
        sae_jax.report(*paths)
    assert not [*tmp_path.rglob("report.html")]


def test_only_a_report_is_replaced(run):
    (run / "report.html").write_text("<p>mine</p>")
    with pytest.raises(UsageError, match="is not a report"):
        sae_jax.report(run)
    (run / "report.html").unlink()
    sae_jax.report(run)
    sae_jax.report(run)


@needs_browser
def test_a_table_sorts_by_numbers_and_no_name_is_run(sweep, tmp_path, monkeypatch):
    monkeypatch.setattr(fit, "N_DRAWS", 20)
    sae_jax.report(sweep, out=tmp_path / "site" / "index.html")
    click = """
        const button = [...document.querySelectorAll("button")].find((b) => b.textContent === "latents");
        button.click(); button.click();
    """
    dom = browse(tmp_path / "site", drive=click)  # which fails on errors, and where a script of data has run
    assert re.search(r'<th[^>]*aria-sort="descending"[^>]*><button type="button">latents', dom)
    rows = re.findall(r'<th scope="row">(n\d+k\d+[^<]*)</th>', dom)
    widths = [int(re.match(r"n(\d+)k", row)[1]) for row in rows]
    assert widths == sorted(widths, reverse=True)
    assert len(set(widths)) == 8
