"""What a reader does with the pages: choosing, listing, noting, comparing, sending a page."""

from __future__ import annotations

import base64
import html
import json
import re

import numpy as np
import pytest

from sae_jax.pages import dashboard, labels, latents, patterns
from sae_jax.types import UsageError
from tests.pages import test_dashboard as pages
from tests.pages.test_dashboard import DEAD, DENSE, FAR, PWN, TOKENS, F, browse, listed, needs_browser, text, visit

HOSTILE = [
    f"<script>{PWN}</script>",
    f'"><img src=x onerror="{PWN}">',
    f"javascript:{PWN}",
    f"</script><script>{PWN}//",
    f"<svg/onload={PWN}>",
    f"' onfocus='{PWN}' autofocus x='",
    "__proto__",
    "\u202e\u2066<b>",
]


def js(value):
    """As JavaScript inside a script of a page."""
    return json.dumps(value).replace("<", "\\u003c")


LABELS = {FAR: ("<b>cats</b>", "by a judge"), 3: (HOSTILE[0], HOSTILE[1]), 5: ("quotes", "")}


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    out = tmp_path_factory.mktemp("reader") / "site"
    made = pages.made()
    subject = pages.subject(labels=LABELS, patterns={FAR: [((1, -1), 4), ((1,), 2)], 3: []})
    dashboard.write_dashboard(out, dashboard.Site(**vars(made) | {"subject": subject, "digest": "d1"}))
    return out


def ask(site, route, script):
    """What a script answers in the open page, as JSON."""
    drive = f"""
        const wait = (ms) => new Promise((done) => setTimeout(done, ms ?? 200));
        const until = async (isSo) => {{ for (let i = 0; i < 100 && !isSo(); i++) await wait(20); }};
        const press = (key) => document.dispatchEvent(new KeyboardEvent("keydown", {{ key, bubbles: true }}));
        const go = async (to) => {{
            location.hash = to;
            await wait(100);
            return document.querySelector("main").innerText;
        }};
        const answer = await (async () => {{ {script} }})();
        const pre = document.createElement("pre");
        pre.textContent = JSON.stringify(answer);
        document.body.append(pre);
    """
    dom = browse(site, route, drive=drive)
    return json.loads(html.unescape(dom[dom.rindex("<pre>") + 5 : dom.rindex("</pre>")]))


def alive():
    return [*range(len(TOKENS)), FAR, DENSE]


# ---- choosing


@needs_browser
def test_ranges_and_places_of_the_search(site):
    index = pages.read_index(site)
    density, score = index["density"], index["score"]
    low = float(np.median(density[alive()]))
    ranged, both, rising, by_label, by_token, none = visit(
        site,
        f"#/?density={low}..0.5",
        f"#/?density={low}..&effect=..{float(score[2])}&sort=latent",
        f"#/?effect=..{float(score[2])}&dir=asc",
        "#/?q=CATS&within=label",
        "#/?q=cat&within=fires",
        "#/?density=0.9..0.95",
    )
    expected = [f for f in alive() if np.float32(low) <= density[f] <= 0.5]
    assert sorted(listed(ranged)) == sorted(expected)
    assert DENSE not in listed(ranged)
    assert listed(both) == [f for f in alive() if density[f] >= np.float32(low) and score[f] <= score[2]]
    assert listed(rising) == sorted((f for f in alive() if score[f] <= score[2]), key=lambda f: score[f])
    assert listed(by_label) == [FAR]
    assert sorted(listed(by_token)) == sorted(f for f in alive() if 1 in index["topTokens"][f])
    assert "No latent is in these ranges. Widen a filter, or clear them." in text(none)


@needs_browser
def test_a_filter_is_typed_and_one_that_is_no_number_is_refused(site):
    typed, wrong = ask(
        site,
        "#/",
        """
        const type = async (id, text) => {
            const input = document.getElementById(id);
            input.value = text;
            input.dispatchEvent(new Event("change"));
            await wait();
        };
        await type("density-0", "1e-2");
        const first = [location.hash, document.activeElement.id];
        await type("effect-1", "much");
        return [first, document.querySelector(".filters .wrong").textContent];
        """,
    )
    assert typed == ["#/?density=0.01..", "density-0"]
    assert wrong == "much is no number; write one as 0.01 or 1e-4."


@needs_browser
def test_latents_like_one(site):
    (_, records) = pages.read(site, "latents-000")
    expected = [f for f, _ in records[3]["near"]]
    expected += [f for f, *_ in records[3]["coactive"] if f not in expected]
    dom, missing = visit(site, "#/?q=~3", "#/?q=~999")
    assert [int(n) for n in re.findall(r'href="#/latent/(\d+)\?q=~3"', dom)] == expected
    assert f"cosine {records[3]['near'][0][1]:.3f}" in text(dom)
    assert "% of the tokens of 3" in text(dom)
    assert "There is no latent 999" in text(missing)


@needs_browser
def test_any_latent_is_one_of_the_list(site):
    seen = ask(
        site,
        "#/",
        """
        const seen = [];
        for (let i = 0; i < 8; i++) {
            await go("#/?latents=2,5,7&list=some");
            press("r");
            await wait();
            seen.push(location.hash);
        }
        return seen;
        """,
    )
    assert {re.match(r"#/latent/(\d+)\?", to)[1] for to in seen} <= {"2", "5", "7"}
    assert all(to.endswith("?latents=2,5,7&list=some") for to in seen)


@needs_browser
def test_previous_and_next_follow_a_list(site):
    (dom,) = visit(site, "#/latent/5?sort=latent&latents=2,5,7-9")
    assert 'href="#/latent/2?sort=latent&amp;latents=2,5,7-9" rel="prev"' in dom
    assert 'href="#/latent/7?sort=latent&amp;latents=2,5,7-9" rel="next"' in dom


# ---- lists and notes


@needs_browser
def test_lists_and_notes_last_and_go_out_and_in(site):
    name, note = HOSTILE[1], f"{HOSTILE[0]}\n  two"
    kept, exported, back, both = ask(
        site,
        f"#/latent/{FAR}",
        f"""
        press("b");
        const note = document.getElementById("note");
        note.value = {js(note)};
        note.dispatchEvent(new Event("change"));
        const form = document.querySelector(".newlist");
        form.querySelector("input").value = {js(name)};
        form.requestSubmit();
        await wait();
        readShelf();
        const kept = [Array.from(shelf.lists.keys()), shelf.notes.get({FAR})];
        const exported = toFile();
        changeShelf((mine) => (mine.lists.clear(), mine.notes.clear()));
        importShelf(JSON.parse(JSON.stringify(exported)));
        const back = toFile();
        importShelf({{ ...exported, lists: [], notes: [{{ latent: {FAR}, note: "mine" }}] }});
        return [kept, exported, back, shelf.notes.get({FAR})];
        """,
    )
    assert kept == [["Bookmarks", name], note]
    assert exported == back
    assert exported["dictionary"] == "d1"
    assert exported["lists"] == [{"name": "Bookmarks", "latents": [FAR]}, {"name": name, "latents": [FAR]}]
    assert both == f"{note}\nmine"  # of two notes none is lost


@needs_browser
def test_files_that_are_not_of_this_dictionary_are_refused_whole(site):
    errors = ask(
        site,
        "#/lists",
        """
        const good = { kind: KIND, dictionary: "d1", title: "t", lists: [], notes: [] };
        const files = [
            { ...good, kind: "other" },
            { ...good, dictionary: "d2", title: "<b>them</b>" },
            { ...good, lists: [{ name: "fine", latents: [1] }, { name: "x", latents: [300] }] },
            { ...good, notes: [{ latent: 1.5, note: "x" }] },
            null,
        ];
        const said = (file) => {
            try {
                return importShelf(file);
            } catch (error) {
                return error.message;
            }
        };
        return [files.map(said), shelf.lists.size];
        """,
    )
    assert errors == [
        [
            "This is no file of lists and notes; choose one that was exported here.",
            "This file is of another dictionary, <b>them</b>; open it on the pages of that.",
            "A list of this file has no name, or holds what is no latent; nothing was imported.",
            "A note of this file is on no latent, or longer than 10000 characters; nothing was imported.",
            "This is no file of lists and notes; choose one that was exported here.",
        ],
        0,
    ]


@needs_browser
def test_a_browser_that_keeps_nothing_says_so(site):
    said, lists, view = ask(
        site,
        "#/latent/3",
        """
        Storage.prototype.setItem = Storage.prototype.getItem = () => {
            throw new DOMException("no", "SecurityError");
        };
        press("b");
        await wait();
        const said = document.getElementById("said").textContent;
        press("b"), press("b");
        return [said, Array.from(shelf.lists.get("Bookmarks")), await go("#/lists")];
        """,
    )
    assert lists == [3]
    assert "keeps nothing for a page opened like this: export lists and notes before you close" in view
    assert said


@needs_browser
def test_hostile_names_notes_and_links_stay_text(site):
    """`browse` fails if a script of theirs has run, or the console has an error."""
    links = [f"#/?latents=3,{FAR}&list={name}" for name in HOSTILE]
    routes = [*links, *(f"#/?q={name}" for name in HOSTILE), "#/lists", "#/latent/3", "#/embed/3", f"#/{HOSTILE[0]}"]
    shown = ask(
        site,
        "#/",
        f"""
        const hostile = {js(HOSTILE)};
        importShelf({{ kind: KIND, dictionary: "d1", title: "t",
            lists: hostile.map((name) => ({{ name, latents: [3] }})),
            notes: hostile.map((note, latent) => ({{ latent, note }})) }});
        const shown = [];
        for (const to of {js(routes)}) shown.push(await go(encodeURI(to)));
        await go("#/lists");
        return [shown, document.querySelectorAll("main script, main img, main svg, [onload], [onerror]").length,
            ({{}}).polluted === undefined && shelf.lists.get("__proto__").size];
        """,
    )
    assert f"<script>{PWN}</script>" in shown[0][0]
    assert f"<script>{PWN}</script>" in shown[0][len(routes) - 4]
    assert "\\u{202e}" in shown[0][len(HOSTILE) - 1]
    assert shown[1:] == [0, 1]


@needs_browser
def test_a_link_of_a_list(site):
    dom, other = visit(site, "#/?latents=7,3,999&list=spikes&silent=1", f"#/?latents={DEAD}")
    assert sorted(listed_of_list(dom)) == [3, 7]
    assert "The link names 999, which is no latent of this dictionary; it is left out." in text(dom)
    assert "Keep in your lists" in text(dom)
    assert listed_of_list(other) == [DEAD]


def listed_of_list(dom):
    return [int(n) for n in re.findall(r'<td class="number"><a href="#/latent/(\d+)\?', dom)]


# ---- one latent, two dictionaries, one file


@needs_browser
def test_keys_focus_and_what_is_told(site):
    help_, closed, focus, said, skipped = ask(
        site,
        "#/",
        """
        press("?");
        const help = document.querySelector("dialog").innerText;
        document.querySelector("dialog button").click();
        await until(() => document.querySelector("dialog") === null);
        const closed = document.querySelector("dialog") === null;
        await go("#/latent/3");
        const focus = document.activeElement.textContent;
        await go("#/?q=cat");
        const said = document.getElementById("said").textContent;
        document.querySelector(".skip").click();
        return [help, closed, focus, said, document.activeElement.tagName];
        """,
    )
    assert "a latent of the list at random" in help_
    assert closed
    assert focus == "Latent 3"
    assert re.fullmatch(r"\d+ latents for “cat”", said)
    assert skipped == "MAIN"


@needs_browser
def test_patterns_and_labels_on_a_page(site):
    far, empty = visit(site, f"#/latent/{FAR}", "#/latent/3")
    assert "Patterns (N2G) ·cat* \u00d74 ·cat \u00d72" in text(far)
    assert "none: it needs more text than a pattern holds" in text(empty)
    assert f"<script>{PWN}</script>" in text(empty)


@needs_browser
def test_two_dictionaries_are_compared(tmp_path):
    _, _, w_dec, _ = pages.inputs()
    other = pages.made(w_dec=np.roll(w_dec, 5, axis=0) + 0.3, title="<i>other</i>")
    dashboard.write_dashboard(tmp_path / "site", pages.made(), other)
    (columns,) = pages.read(tmp_path / "site", "matches")
    nearest, cosine = (
        np.frombuffer(base64.b64decode(columns["cosine"][name]), kind)
        for name, kind in (("latents", "<i4"), ("values", "<f4"))
    )
    table, pair, by_firing = visit(
        tmp_path / "site", "#/compare", f"#/compare?latent={FAR}", "#/compare?sort=firing&dir=desc&cosine=0.5.."
    )
    order = [int(n) for n in re.findall(r'<td class="number"><a href="#/compare\?latent=(\d+)', table)]
    assert order == sorted(alive(), key=lambda f: (cosine[f], f))
    assert "Beside <i>other</i>" in text(table)
    assert f"→ {nearest[order[0]]}" in text(table)
    frames = re.findall(r'<iframe src="([^"]*)"', pair)
    assert frames[0].endswith(f"driven.html#/embed/{FAR}")
    assert frames[1] == f"beside/index.html#/embed/{nearest[FAR]}"
    assert by_firing.count("<tr") == 1 + sum(cosine[f] >= 0.5 for f in alive())
    embedded = browse(tmp_path / "site", f"#/embed/{FAR}")
    assert '<body class="embed">' in embedded
    assert "Open in the dashboard" in text(embedded)


def test_sources_of_a_crosscoder(tmp_path):
    _, _, w_dec, unembed = pages.inputs()
    first = np.random.default_rng(1).normal(size=(F, 8)).astype(np.float32)
    sources = [
        latents.SourceRows("base.<b>", first, 2.0),
        latents.SourceRows("tuned", w_dec, 0.5, lambda rows: rows @ unembed),
    ]
    site = tmp_path / "site"
    dashboard.write_dashboard(site, dashboard.Site(**vars(pages.made()) | {"subject": pages.subject(sources=sources)}))
    norms = np.stack([np.linalg.norm(first, axis=1) * 2, np.linalg.norm(w_dec, axis=1) / 2], axis=1)
    share = norms / norms.sum(1, keepdims=True)
    (index,) = pages.read(site, "index")
    assert index["sources"] == ["base.<b>", "tuned"]
    for i in range(2):
        got = np.frombuffer(base64.b64decode(index["shares"][i]), "<f4")
        np.testing.assert_allclose(got, share[:, i], rtol=1e-5)
    _, records = pages.read(site, "latents-000")
    base, tuned = records[3]["sources"]
    assert base["norm"] == pytest.approx(np.linalg.norm(first[3]), rel=1e-3)
    assert base["share"] == pytest.approx(share[3, 0], rel=1e-3)
    assert "up" not in base
    assert tuned["up"] == records[3]["up"]
    if pages.CHROMIUM:
        (page, table) = visit(site, "#/latent/3", "#/?share1=0.2..")
        assert "base.<b>" in text(page)
        assert len(listed_of_list(table)) == sum(share[f, 1] >= 0.2 for f in alive())


def test_a_single_file_is_all_there_is(tmp_path):
    out = tmp_path / "one.html"
    dashboard.write_page(out, pages.made(latents=np.array([3, FAR]), title="</script><b>"))
    page = out.read_text()
    assert [p.name for p in tmp_path.iterdir()] == ["one.html"]
    assert not re.search(r'(src|href)="(?!#|data:,)', page)
    assert page.count("</script") == page.count("<script") == len(dashboard.SCRIPTS) + 5  # of data
    dashboard.write_page(out, pages.made(latents=np.array([3])))  # replaces its like
    (tmp_path / "thesis.html").write_text("mine")
    with pytest.raises(UsageError, match=r"thesis.html exists and is not a page of a dashboard; choose another name"):
        dashboard.write_page(tmp_path / "thesis.html", pages.made(latents=np.array([3])))
    with pytest.raises(UsageError, match="exists and is not a dashboard; choose another folder"):
        dashboard.write_dashboard(out, pages.made())


@needs_browser
def test_a_single_file_shows_its_latents_and_their_texts(tmp_path):
    (tmp_path / "site").mkdir()
    out = tmp_path / "site" / "index.html"
    dashboard.write_page(out, pages.made(latents=np.array([3, FAR])))
    whole = ask(
        tmp_path / "site",
        f"#/embed/{FAR}",
        """
        document.querySelector(".context button").click();
        await wait();
        return document.querySelector(".whole").innerText;
        """,
    )
    assert "·cat" in whole
    assert sorted(listed(browse(tmp_path / "site"))) == [3, FAR]


# ---- labels and patterns


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.csv", 'label,latent,more\n"a, b\n c",3,x\n second ,0,\n'),
        ("a.jsonl", '{"latent": 3, "label": "a, b c"}\n\n{"latent": 0, "explanation": "second", "model": "m"}\n'),
    ],
)
def test_labels_of_a_file(tmp_path, name, content):
    (tmp_path / name).write_text(content)
    got = labels.read_labels_file(tmp_path / name, 4)
    assert got == {3: ("a, b c", f"from {name}"), 0: ("second", f"from {name}")}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", "", r"a.txt: the name ends in .txt, not in .csv or .jsonl; give a"),
        ("a.csv", "latent,label\n", "a.csv has no labels; give a"),
        ("a.csv", "id,text\n1,x\n", "a.csv, line 2: no latent and label, but id, text; give a"),
        ("a.csv", "latent,label\n1.5,x\n", "a.csv, line 2: no latent and label, but latent, label; give a"),
        ("a.csv", "latent,label\n4,x\n", "a.csv, line 2: latent 4 does not exist; choose from 0 to 3"),
        ("a.jsonl", '{"latent": 1, "label": "x"}\n{', "a.jsonl, line 2: not valid JSON"),
        ("a.jsonl", '{"latent": true, "label": "x"}', "line 1: no latent and label"),
        ("a.csv", f"latent,label\n1,{'x' * 501}\n", "line 2: a label of 501 characters; give at most 500"),
        ("none.csv", None, "none.csv: No such file or directory; give a"),
    ],
)
def test_files_that_are_none_of_labels(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(Exception, match=message) as error:
        labels.read_labels_file(tmp_path / name, 4)
    assert "\n" not in str(error.value)


def test_patterns_are_those_of_the_strongest_contexts(monkeypatch):
    """A latent of " cat" fires on that token alone, whatever stands before it."""
    table, _, w_dec, _ = pages.inputs()
    strongest = patterns.strongest(table, w_dec, np.array([1, DEAD, FAR]), 2)
    written = [table.of_latent(f)[1].mean() * np.linalg.norm(w_dec[f]) for f in (1, FAR)]
    assert strongest == [f for _, f in sorted(zip(written, (1, FAR), strict=True), reverse=True)]

    def values(subject):
        return lambda texts, chosen: np.array([5.0 * (t[-1] == 1) for t in texts], np.float32)

    class Subject:
        first = 0
        tokenizer = type("", (), {"special_ids": ()})
        model = type("", (), {"spec": type("", (), {"n_context": None})})

    monkeypatch.setattr(patterns, "in_model", values)
    made = patterns.patterns_of(Subject(), table, [FAR])
    assert made == {FAR: [((1,), patterns.N_EXAMPLES)]}


@needs_browser
def test_what_was_too_much_work_is_said_on_the_page(tmp_path, monkeypatch):
    monkeypatch.setattr(latents, "_MOST_COSINES", 1)
    (dom,) = visit(pages.write(tmp_path / "site"), f"#/latent/{FAR}")
    assert "Nearest decoder rows (cosine)Left out: too many to compare." in text(dom)
