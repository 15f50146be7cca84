"""The site's data against plain numpy, and the site itself in a headless browser, opened from disk."""

from __future__ import annotations

import base64
import functools
import html
import http.server
import json
import re
import shutil
import subprocess
import threading

import numpy as np
import pytest

import sae_jax
from sae_jax.analysis import examples
from sae_jax.pages import dashboard, latents
from sae_jax.pages import site as pages
from sae_jax.types import UsageError, UserError

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="no chromium on PATH; install it to test the page itself")

PWN = "document.documentElement.dataset.pwned=1"
TOKENS = [
    "the",
    " cat",
    "\n",
    f"<script>{PWN}</script>",
    "</script>",
    "\"'`${1}",
    "🙂",
    "\udce2\udc80",
    "שלום",
    "\t",
    f'<img src=x onerror="{PWN}">',
    "&amp;",
    "\u202e",
    "<!--",
]
N_SEQ, N_POS, D, F = 12, 150, 16, 300
DEAD, FAR, DENSE = 20, 290, 291


@functools.cache
def inputs():
    """Latent f < 14 fires on token f, FAR (in the fifth file) on " cat", DENSE everywhere, others never."""
    rng = np.random.default_rng(0)
    sequences = rng.choice(len(TOKENS), (N_SEQ, N_POS), p=np.arange(1, 15) / 105).astype(np.int32)
    sequences = sequences[:, ::-1].copy()
    seq, pos = np.divmod(np.arange(N_SEQ * N_POS), N_POS)
    token = sequences[seq, pos]
    values = rng.uniform(1, 2, (len(token), 3)).astype(np.float32) * [1 + token[0] * 0, 3, 0.5]
    values[token != 1, 1] = 0
    indices = np.stack([token, np.full_like(token, FAR), np.full_like(token, DENSE)], axis=1)
    kept = pos > 0  # the first token of a sequence has no row, as when special tokens are masked
    block = [x[kept] for x in (indices, values.astype(np.float32), seq * N_POS + pos)]
    w_dec = rng.normal(size=(F, D)).astype(np.float32)
    w_dec[7] = w_dec[3] * 2 + 0.1 * w_dec[7]
    unembed = rng.normal(size=(D, len(TOKENS) + 2)).astype(np.float32)
    unembed[:, len(TOKENS) :] = 100  # padding of the vocabulary
    return examples.collect([block], F, sequences), sequences, w_dec, unembed


def write(out, progress=None, **changes):
    dashboard.write_dashboard(out, made(**changes), progress=progress)
    return out


def made(**changes):
    arguments = {
        "token_strings": TOKENS,
        "title": "<b>run</b> & co",
        "about": "topk, 300 latents, of <i>resid</i>",
        "metrics": [("fvu", np.float32(0.25), "what is left"), ("ce", float("nan"), ""), ("note", "</script>", "")],
        "config": {"sae": {"k": 3, "name": "<i>x</i>"}},
    }
    of_subject = {
        name: changes.pop(name) for name in ("w_dec", "logit_effects", "lengths", "n_tokens") if name in changes
    }
    return dashboard.Site(subject(**of_subject), **(arguments | changes))


def subject(**changes):
    table, _, w_dec, unembed = inputs()
    arguments = {
        "table": table,
        "w_dec": w_dec,
        "n_tokens": len(TOKENS),
        "logit_effects": lambda rows: rows @ unembed,
        "labels": {FAR: ("<b>cats</b>", "explained by a judge; detection 0.90")},
    }
    return latents.Subject(**(arguments | changes))


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    return write(tmp_path_factory.mktemp("dashboard") / "site")


def read(site, name):
    text = (site / "data" / f"{name}.js").read_text()
    return json.loads("[" + text[text.index("(") + 1 : text.rindex(")")] + "]")


def read_index(site):
    """The index, its columns as arrays; without the places of no token."""
    (index,) = read(site, "index")
    for name in ("density", "score", "max"):
        index[name] = np.frombuffer(base64.b64decode(index[name]), "<f4")
    for name in ("topTokens", "topLogits"):
        ids = np.frombuffer(base64.b64decode(index[name]), "<u2").reshape(-1, 3)
        index[name] = [row[row != 2**16 - 1].tolist() for row in ids]
    if index["latents"] is not None:
        index["latents"] = np.frombuffer(base64.b64decode(index["latents"]), "<u4").tolist()
    return index


# ---- data


def test_padding_is_not_shown(tmp_path):
    """Neither around a place nor in the whole sequence."""
    lengths = np.where(np.arange(N_SEQ) % 2, N_POS - 8, N_POS)
    site = write(tmp_path / "site", lengths=lengths)
    _, records = read(site, "latents-000")
    seq, pos = (np.array(records[0][name]) for name in ("seq", "pos"))
    assert records[0]["length"] == lengths[seq].tolist()
    shown = np.minimum(lengths[seq], pos + latents.AFTER + 1) - np.maximum(pos - latents.BEFORE, 0)
    assert len(base64.b64decode(records[0]["ids"])) == 2 * shown.clip(0).sum()
    _, texts = read(site, "text-000")
    assert {len(base64.b64decode(text)) // 2 for text in texts if text} == {N_POS, N_POS - 8}


def test_lengths_of_padded_sequences():
    sequences = np.array([[0, 5, 6, 0, 0], [0, 5, 0, 7, 8], [0, 0, 0, 0, 9]])
    assert pages._lengths(sequences, 0).tolist() == [3, 5, 5]


def test_index_columns(site):
    table, _, w_dec, unembed = inputs()
    index = read_index(site)
    np.testing.assert_allclose(index["density"], table.density, rtol=1e-3)
    assert index["nSilent"] == F - len(TOKENS) - 2
    assert index["metrics"] == [["fvu", 0.25, "what is left"], ["ce", None, ""], ["note", "</script>", ""]]
    effect = w_dec @ unembed[:, : len(TOKENS)]
    for latent in (1, FAR, DENSE, DEAD):
        _, values = table.of_latent(latent)
        mean = values.mean() if len(values) else 0
        assert index["score"][latent] == pytest.approx(effect[latent].std() * mean, rel=2e-3)
        assert index["max"][latent] == pytest.approx(values.max(initial=0), rel=1e-3)
    assert index["topTokens"][FAR] == [1]
    assert index["topTokens"][DEAD] == []
    assert index["topLogits"][5] == np.argsort(-effect[5])[:3].tolist()


def test_energy_stands_in_for_effect_without_a_language_model(tmp_path):
    table, _, w_dec, _ = inputs()
    index = read_index(write(tmp_path / "site", logit_effects=None))
    assert index["scoreName"] == "energy"
    expected = (table.of_latent(DENSE)[1] ** 2).sum() / table.n_rows * (w_dec[DENSE] ** 2).sum()
    assert index["score"][DENSE] == pytest.approx(expected, rel=1e-3)
    assert index["topLogits"][DENSE] == []


@pytest.mark.long
def test_of_a_model_that_is_not_supported_there_are_no_effects(tmp_path, capsys):
    (tmp_path / "lm").mkdir()
    (tmp_path / "lm" / "config.json").write_text(json.dumps({"model_type": "mamba"}))
    rows, ids = np.random.default_rng(0).standard_normal((32, 8, 16)), np.arange(256).reshape(32, 8)
    origin = {"model": str(tmp_path / "lm"), "hook": "backbone.layers.1"}
    activations = sae_jax.write_activations(tmp_path / "set", rows, tokens=ids, tokenizer="bundled", **origin)
    sae_jax.train(activations, n_latents=32, k=4, steps=2, batch_size=64, out=tmp_path / "run")
    sae_jax.dashboard(tmp_path / "run", tmp_path / "site", tokens=256)
    assert "is not supported: pages are without effects on the logits" in " ".join(capsys.readouterr().err.split())
    assert read(tmp_path / "site", "index")[0]["scoreName"] == "energy"


def test_record_of_a_latent(site):
    table, sequences, w_dec, unembed = inputs()
    block, records = read(site, "latents-004")
    record = records[FAR - 4 * 64]
    assert block == 4
    top = table.top(FAR, 20, one_per_sequence=True)
    assert record["nTop"] == len(top.seq)
    assert record["seq"][: len(top.seq)] == top.seq.tolist()
    windows = [sequences[s, max(0, p - 20) : p + 11] for s, p in zip(record["seq"], record["pos"], strict=True)]
    ids = np.frombuffer(base64.b64decode(record["ids"]), "<u2")
    np.testing.assert_array_equal(ids, np.concatenate(windows))
    dense = np.zeros((N_SEQ, N_POS))
    places, values = table.of_latent(FAR)
    dense.ravel()[places] = values
    for seq, pos, flat in zip(record["seq"], record["pos"], record["values"], strict=True):
        expected = np.zeros(N_POS)
        expected[max(0, pos - 128) : pos + 129] = dense[seq, max(0, pos - 128) : pos + 129]
        got = np.zeros(N_POS)
        got[pos + np.array(flat[::2], int)] = flat[1::2]
        np.testing.assert_allclose(got, expected, rtol=1e-3)
    effect = w_dec[FAR] @ unembed[:, : len(TOKENS)]
    effect -= effect.mean()
    assert [token for token, _ in record["down"]] == np.argsort(effect)[:10].tolist()
    np.testing.assert_allclose([value for _, value in record["up"]], np.sort(effect)[::-1][:10], rtol=2e-3)
    assert sum(count for _, _, count, _ in record["intervals"]) == record["count"] == len(values)


@pytest.mark.parametrize("n", [3, 500])
def test_decoder_neighbours_are_the_largest_cosines(n):
    _, _, w_dec, _ = inputs()
    unit = w_dec / np.linalg.norm(w_dec, axis=1, keepdims=True)
    cosine = unit @ unit.T
    np.fill_diagonal(cosine, -2)
    some = np.arange(5, F, 7)
    near, got = latents.decoder_neighbours(w_dec, some, n)
    n = min(n, F - 1)
    np.testing.assert_allclose(got, -np.sort(-cosine[some], axis=1)[:, :n], atol=1e-6)
    np.testing.assert_allclose(cosine[some[:, None], near], got, atol=1e-6)


def test_three_bytes_hold_large_vocabularies():
    ids = np.array([5, 70_000, 2**24 - 1], np.int32)
    read_back = np.frombuffer(base64.b64decode(dashboard._packed(ids, 3)), np.uint8).reshape(-1, 3)
    np.testing.assert_array_equal(read_back @ [1, 256, 65536], ids)


def test_rounding_keeps_four_digits():
    assert dashboard._short(np.array([0.0, 1234567.0, -0.000123456, 9.99999])) == [0, 1235000, -0.0001235, 10]


def test_data_files_are_ascii_without_tags(site):
    for path in (site / "data").iterdir():
        assert "<" not in path.read_bytes().decode("ascii")


# ---- the folder


def test_a_folder_that_is_no_dashboard_is_left_alone(tmp_path):
    out = tmp_path / "thesis"
    out.mkdir()
    (out / "index.html").write_text("my thesis")
    with pytest.raises(UsageError, match="is not a dashboard; choose another folder"):
        write(out)
    assert [p.name for p in tmp_path.rglob("*")] == ["thesis", "index.html"]


def test_what_begins_there_while_a_dashboard_is_made_is_left_alone(tmp_path):
    def begin(done):
        (tmp_path / "run").mkdir(exist_ok=True)
        (tmp_path / "run" / "config.json").write_text("a run")

    with pytest.raises(UsageError, match="is not a dashboard; choose another folder"):
        write(tmp_path / "run", progress=begin)
    assert [p.name for p in tmp_path.rglob("*")] == ["run", "config.json"]


def test_two_dictionaries_side_by_side(tmp_path):
    """Each has its site, and each latent names the nearest of the other."""
    _, _, w_dec, _ = inputs()
    moved = np.roll(w_dec, 5, axis=0)
    dashboard.write_dashboard(tmp_path / "site", made(), made(w_dec=moved, title="other"))
    for folder, step, href in (("", 5, "beside/index.html"), ("beside", -5, "../index.html")):
        part = tmp_path / "site" / folder
        assert read_index(part)["other"]["href"] == href
        (columns,) = read(part, "matches")
        nearest = np.frombuffer(base64.b64decode(columns["cosine"]["latents"]), "<i4")
        np.testing.assert_array_equal(nearest, (np.arange(F) + step) % F)
        alike = np.frombuffer(base64.b64decode(columns["firing"]["latents"]), "<i4")
        assert alike[FAR] in (1, FAR)  # both fire where the token is, and nowhere else
        assert alike[DEAD] == -1


def test_a_dashboard_is_replaced_whole_and_survives_a_failure(tmp_path):
    out = write(tmp_path / "site")
    (out / "old").touch()

    def fail(rows):
        raise MemoryError

    with pytest.raises(MemoryError):
        write(out, logit_effects=fail)
    assert (out / "old").exists()
    seen = []
    write(out, latents=np.array([FAR, 3]), progress=seen.append)
    assert not (out / "old").exists()
    assert seen == [2]
    assert [p.name for p in tmp_path.iterdir()] == ["site"]
    assert read_index(out)["latents"] == [3, FAR]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"w_dec": np.ones((7, D), np.float32)}, "w_dec has 7 rows for 300 latents"),
        ({"n_tokens": 3}, "has no text; give more than 3 token_strings"),
        ({"latents": np.array([1, 300])}, "latent 300 does not exist; choose from 0 to 299"),
        ({"latents": np.array([], int)}, "no latents to show"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        write(tmp_path / "site", **changes)
    assert not list(tmp_path.iterdir())


# ---- the page


def browse(site, route="", *, drive="", url=None, expected="(?!)"):
    """The markup at a route, after `drive` (JavaScript) has run; fails on any error but those expected."""
    if drive:
        page = (site / "index.html").read_text()
        later = f'addEventListener("load", () => setTimeout(async () => {{ {drive} }}, 500))'
        (site / "driven.html").write_text(page.replace("</body>", f"<script>{later}</script></body>"))
    url = url or f"file://{site}/{'driven' if drive else 'index'}.html"
    profile = site.parent / "profile"
    flags = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
    flags += " --disable-component-update --disable-sync --enable-logging=stderr --v=0 --virtual-time-budget=5000"
    command = [CHROMIUM, *flags.split(), f"--user-data-dir={profile}", "--dump-dom", url + route]
    done = subprocess.run(command, capture_output=True, timeout=60, check=True)
    shutil.rmtree(profile, ignore_errors=True)
    console = [line for line in done.stderr.decode(errors="replace").splitlines() if "CONSOLE" in line]
    assert not [line for line in console if not re.search(expected, line)]
    dom = done.stdout.decode()
    assert not re.search(r"<html[^>]*pwned", dom)
    return dom


def visit(site, *routes):
    """The markup of the main part at each route in turn, following links within one open page."""
    drive = f"""
        const seen = [];
        for (const route of {json.dumps(routes)}) {{
            location.hash = route;
            await new Promise((done) => setTimeout(done, 300));
            seen.push(document.querySelector("main").innerHTML);
        }}
        const pre = document.createElement("pre");
        pre.textContent = JSON.stringify(seen);
        document.body.append(pre);
    """
    dom = browse(site, drive=drive)
    return json.loads(html.unescape(dom[dom.rindex("<pre>") + 5 : dom.rindex("</pre>")]))


def text(dom):
    body = re.sub(r"(?s)<script.*?</script>", "", dom[max(0, dom.find("<body")) :])
    return html.unescape(re.sub(r"<[^>]*>", "", body))


def listed(dom):
    return [int(n) for n in re.findall(r'<td class="number"><a href="#/latent/(\d+)', dom)]


@needs_browser
def test_table_shows_living_latents_by_effect_and_the_summary(site):
    dom = browse(site)
    shown = text(dom)
    index = read_index(site)
    assert listed(dom) == sorted([*range(len(TOKENS)), FAR, DENSE], key=lambda f: -index["score"][f])
    assert "16 latents" in shown
    assert "<b>run</b> & co" in shown
    assert "topk, 300 latents, of <i>resid</i>" in shown
    assert "fvu0.25" in shown
    assert "what is left" in shown
    assert "active on none of these 1,788 tokens" in shown
    assert "ce\u2013" in shown
    assert "sae.name<i>x</i>" in shown
    assert f"<script>{PWN}</script>" in shown
    assert r"\xe2\x80" in shown
    assert r"\u{202e}" in shown
    assert "שלום" in shown
    assert "🙂" in shown
    assert "↵" in shown
    assert len(re.findall("<rect", dom)) == 40


@needs_browser
def test_address_sorts_filters_and_pages_the_table(site):
    density = inputs()[0].density
    index = read_index(site)
    order = sorted([*range(len(TOKENS)), FAR, DENSE], key=lambda f: (-density[f], f))
    cat = [f for f in order if 1 in index["topTokens"][f] + index["topLogits"][f]]
    assert FAR in cat

    by_density, rising, cats, escaped, number, page = visit(
        site,
        "#/?sort=density",
        "#/?sort=density&dir=asc",
        "#/?q=%20CAT&sort=max",
        r"#/?q=\xE2\x80",
        f"#/?q={DEAD}",
        "#/?sort=latent&silent=1&page=3",
    )
    assert listed(by_density) == order
    assert listed(rising)[-1] == DENSE
    assert listed(cats) == sorted(cat, key=lambda f: -index["max"][f])
    assert "for “·CAT”" in text(cats)
    assert 7 in listed(escaped)
    assert DEAD in listed(number)
    assert listed(page) == list(range(200, 300))


@needs_browser
def test_page_of_a_latent(site):
    table = inputs()[0]
    dom = browse(site, f"#/latent/{FAR}")
    shown = text(dom)
    top = table.top(FAR, 20, one_per_sequence=True)
    assert f"Latent {FAR}" in shown
    assert "<b>cats</b> explained by a judge; detection 0.90" in shown
    count = len(table.of_latent(FAR)[0])  # wherever it fires, so do those of its token and the dense one
    assert f"Active on the same {count} tokens1100 %" in shown
    assert f"On {count} of its {count} tokens; Jaccard index 1.000" in dom
    assert f"activations{count}" in shown
    assert "Interval 5 of 5" in shown
    assert "Promoted tokens" in shown
    contexts = re.findall(r'<li class="context" data-seq="(\d+)" data-pos="(\d+)"', dom)
    places = list(zip(top.seq.astype(str), top.pos.astype(str), strict=True))
    assert contexts[: len(places)] == places
    peaks = re.findall(r'<span class="token peak" data-id="(\d+)" data-pos="(\d+)" data-value="([\d.]+)"', dom)
    assert {token for token, _, _ in peaks} == {"1"}
    np.testing.assert_allclose([float(v) for _, _, v in peaks[: len(places)]], top.value, rtol=1e-3)
    index = read_index(site)
    order = sorted([*range(len(TOKENS)), FAR, DENSE], key=lambda f: -index["score"][f])
    around = {"prev": order.index(FAR) - 1, "next": order.index(FAR) + 1}
    for rel, at in around.items():
        if 0 <= at < len(order):
            assert f'href="#/latent/{order[at]}" rel="{rel}"' in dom
    assert len(re.findall("<rect", dom)) == 40


@needs_browser
def test_pages_with_nothing_to_show_say_so(site):
    silent, missing, number, word = visit(site, f"#/latent/{DEAD}", "#/latent/999", "#/?q=99999", "#/?q=nowhere")
    assert "Silent on all 1,788 tokens" in text(silent)
    assert "There is no latent 999: latents have numbers from 0 to 299" in text(missing)
    assert "There is no latent 99999: latents have numbers from 0 to 299" in text(number)
    assert "No latent fires on, or promotes, such a token, and no label or note has it." in text(word)


@needs_browser
def test_hostile_tokens_stay_text_in_contexts(site):
    shown = text(browse(site, "#/latent/3"))
    assert f"<script>{PWN}</script>" in shown
    assert f'<img·src=x·onerror="{PWN}">' in shown
    assert "&amp;" in shown
    assert "<!--" in shown


@needs_browser
def test_keys_search_and_whole_sequences(site):
    press = "document.dispatchEvent(new KeyboardEvent('keydown', {key: '%s', bubbles: true, cancelable: true}));"
    wait = "await new Promise((done) => setTimeout(done, 300));"
    forward = browse(site, "#/latent/13?sort=latent", drive=press % "ArrowRight")
    assert f">Latent {FAR}</h1>" in forward
    typed = "document.activeElement.value = 'cat'; document.activeElement.dispatchEvent(new Event('input'));"
    found = browse(site, "#/latent/2", drive=press % "/" + typed + wait)
    assert FAR in listed(found)
    opened = browse(site, f"#/latent/{FAR}", drive="document.querySelector('.context button').click();" + wait)
    whole = re.search(r'<div class="whole"[^>]*>(.*?)</div>', opened, re.S)
    assert whole is not None
    assert len(re.findall(r'<span class="token', whole[1])) == N_POS
    assert re.search(r'newline">↵</span><br>', whole[1])


@needs_browser
def test_a_token_of_a_line_end_and_indentation_breaks_between_them(tmp_path):
    site = write(tmp_path / "site", token_strings=["\n" + " " * 9 if t == "\n" else t for t in TOKENS])
    wait = "await new Promise((done) => setTimeout(done, 300));"
    opened = browse(site, f"#/latent/{FAR}", drive="document.querySelector('.context button').click();" + wait)
    whole = re.search(r'<div class="whole"[^>]*>(.*?)</div>', opened, re.S)
    assert whole is not None
    assert re.search(r'newline">↵</span><br><span class="glyph">·', whole[1])
    assert "·<small>\u00d79</small>" in re.sub("</?span[^>]*>", "", browse(site))  # in the table it is counted


@pytest.fixture
def server(site):
    """Where a static server serves the site."""

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=site))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@needs_browser
def test_a_static_server_serves_it_as_well(site, server):
    dom = browse(site, f"#/latent/{FAR}", url=f"{server}/index.html")
    assert f">Latent {FAR}</h1>" in dom


@needs_browser
def test_tokens_are_on_a_narrow_screen(site, server):
    """What a latent fires on must not be to the right of it."""
    measure = """
        const box = document.createElement("iframe");
        box.style.width = "400px";
        box.src = "index.html";
        document.body.append(box);
        await new Promise((done) => setTimeout(done, 900));
        const chip = box.contentDocument.querySelector("td.chips .chip").getBoundingClientRect();
        document.documentElement.dataset.right = chip.right;
    """
    right = re.search(r'data-right="([\d.]+)"', browse(site, drive=measure, url=f"{server}/driven.html"))
    assert right is not None
    assert float(right[1]) < 400


@needs_browser
def test_a_missing_file_is_named(site, tmp_path):
    shutil.copytree(site, tmp_path / "site")
    (tmp_path / "site" / "data" / "latents-004.js").unlink()
    shown = text(browse(tmp_path / "site", f"#/latent/{FAR}"))
    assert "data/latents-004.js cannot be read; copy the whole folder of the dashboard" in shown


@needs_browser
def test_an_error_in_the_console_would_be_seen(site):
    with pytest.raises(AssertionError):
        browse(site, drive="console.error('x');")
