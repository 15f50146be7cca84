"""The views of `explore` in a headless browser, with a stub of a model that says hostile things."""

from __future__ import annotations

import html
import json
import re

import pytest

from sae_jax.pages import dashboard, explore
from sae_jax.types import UserError
from tests.pages import test_dashboard
from tests.pages.test_dashboard import DEAD, DENSE, FAR, PWN, TOKENS, needs_browser, text
from tests.pages.test_explore import serving

ATTACK = f'</script><img src=x onerror="{PWN}"><b>bold</b>${{1}} \u202e'


class Model:
    """Its texts are the tokens of TOKENS; latent FAR is at " cat" alone, and DENSE everywhere."""

    def __init__(self, **about):
        self.asked = []
        self.told = {"nContext": 99, "hows": ["clamp", "add", "norm"], "noSteering": None, "noChat": None} | about

    def about(self):
        return self.told

    def latents(self, asked):
        self.asked.append(asked.text)
        if asked.text == "wrong":
            raise UserError(ATTACK)
        return {
            "tokens": TOKENS,
            "nActive": [2 if at == 1 else 1 for at in range(len(TOKENS))],
            "atTokens": [[FAR, 4.0, DENSE, 0.5] if at == 1 else [DENSE, 0.25] for at in range(len(TOKENS))],
            "ranked": [[FAR, 4.0, 4.0, 1], [DENSE, 0.5, 5.0, 14]],
            "nRanked": 2000,
            "values": None if asked.latent is None else [4.0 if at == 1 else 0 for at in range(len(TOKENS))],
        }

    def sides(self, asked):
        self.asked.append(asked)
        if asked.prompt == "wrong":
            raise UserError(ATTACK)

        def write(side):
            yield {"text": f"{side} "}
            if asked.seed == 9:
                raise UserError(ATTACK)
            yield {"text": ATTACK}
            yield {"text": "", "end": "2 tokens"}

        return {side: write(side) for side in ("unsteered", "steered")}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return test_dashboard.write(tmp_path_factory.mktemp("explore") / "site")


@pytest.fixture
def view(folder):
    """Shows a view with a model, after `before` and, on the page, `drive` (JavaScript) have run: its markup."""

    def show(model, route, drive="", expected="(?!)", before=""):
        later = f"""{before}
        addEventListener("load", async () => {{
            const wait = (ms = 250) => new Promise((done) => setTimeout(done, ms));
            // Each turn asks the server something, so that this clock waits for the real one.
            const until = async (isSo) => {{
                for (let i = 0; i < 150 && !isSo(); i++) {{
                    await fetch("api/about");
                    await wait(10);
                }}
            }};
            const ended = () => [...document.querySelectorAll(".sides small")]
                .every((end) => /tokens/.test(end.textContent));
            const type = (to, value) => {{
                to.value = value;
                to.dispatchEvent(new Event("input", {{bubbles: true}}));
            }};
            const press = (to, key) => to.dispatchEvent(new KeyboardEvent("keydown", {{key, bubbles: true}}));
            const $ = (name) => document.querySelector(name);
            const field = (name) => [...document.querySelectorAll("label.field")]
                .find((label) => label.textContent.startsWith(name)).querySelector("input, textarea, select");
            await wait(500);
            {drive}
        }});
        """
        # Inline scripts are forbidden, so what drives the page is a file of the site, as are its own.
        (folder / "drive.js").write_text(later)
        page = dashboard.page_html("t", "about", [*explore.SCRIPTS, "drive.js"], explore.STYLES)
        (folder / "driven.html").write_text(page)
        why_not = "" if model else ATTACK
        with serving(folder, "t", "about", model, why_not) as (address, _):
            return test_dashboard.browse(folder, route, url=f"{address}driven.html", expected=expected)

    return show


def rows(dom, label):
    """Latents of the table in the section of this name."""
    section = re.search(rf'<section aria-label="{label}">(.*?)</section>', dom, re.S)
    assert section is not None
    return [int(n) for n in re.findall(r'<td class="number"><a href="#/latent/(\d+)', section[1])]


@needs_browser
def test_a_text_with_its_latents_and_one_that_colours_it(view):
    model = Model()
    dom = view(model, f"#/text?text=typed&token=1&latent={FAR}&sort=sum")
    assert model.asked == ["typed"]
    assert "14 of at most 99 tokens" in text(dom)
    assert rows(dom, "At the token") == [FAR, DENSE]
    assert rows(dom, "Over the text") == [DENSE, FAR]  # by sum
    assert "the first 2 of 2,000 latents" in text(dom)
    tokens = re.findall(r'<span class="token" role="button" data-token="(\d+)".*?--heat-share: ([\d.]+)', dom)
    assert [int(at) for at, _ in tokens] == list(range(len(TOKENS)))
    assert [float(heat) > 0.5 for _, heat in tokens] == [at == 1 for at in range(14)]
    assert re.findall(r'data-token="(\d+)" aria-pressed="true"', dom) == ["1"]
    shown = text(dom)
    assert "<b>cats</b> ·cat" in shown  # its label and what it fires on
    for token in (f"<script>{PWN}</script>", f'<img·src=x·onerror="{PWN}">', r"\xe2\x80", r"\u{202e}", "&amp;", "<!--"):
        assert token in shown


@needs_browser
def test_labels_that_come_late_are_shown_and_what_is_typed_stays(view):
    """Those of a million latents take a second."""
    model = Model()
    before = """
        const load = script;
        const allowed = new Promise((done) => (window.allow = done));
        script = (name) => (name === "labels.js" ? allowed.then(() => load(name)) : load(name));
    """
    drive = """
        await until(() => $(".found"));
        type($("textarea"), "typed later");
        await wait(400);
        await until(() => $(".found section"));
        const early = $("main").textContent.includes("<b>cats</b>");
        allow();
        await until(() => $("main").textContent.includes("<b>cats</b>"));
        document.documentElement.dataset.at = `${early} ${$("textarea").value}`;
    """
    dom = view(model, f"#/text?text=typed&latent={FAR}", drive, before=before)
    assert 'data-at="false typed later"' in dom
    assert "<b>cats</b> ·cat" in text(dom)
    assert set(model.asked) == {"typed", "typed later"}


@needs_browser
def test_typing_asks_once_after_a_pause_and_keeps_the_address(view):
    model = Model()
    drive = """
        for (const value of ["o", "on", "one / two"]) type($("textarea"), value);
        press($("textarea"), "/");
        await wait(400);
        $('[data-sort="tokens"]').click();
        $("[data-show]").click();
        await wait();
        press($('[data-token="13"]'), "ArrowLeft");
        document.documentElement.dataset.at = document.activeElement.dataset.token;
        document.documentElement.dataset.hash = location.hash;
    """
    dom = view(model, "#/text?text=first", drive)
    assert model.asked == ["first", "one / two", "one / two"]  # the last for the values of a latent
    found = re.search(r'data-at="(\d+)" data-hash="([^"]*)"', dom)
    assert found is not None
    assert found[1] == "12"
    assert html.unescape(found[2]) == f"#/text?text=one+%2F+two&latent={DENSE}&token=12&sort=tokens"


@needs_browser
def test_what_a_text_is_refused_for_is_shown_as_text(view):
    dom = view(Model(), "#/text?text=wrong", expected="status of 400")
    assert ATTACK.strip().replace("\u202e", r"\u202e") in text(dom)
    assert '<p class="status failed" role="status">' in dom


@needs_browser
def test_both_texts_are_written_side_by_side(view, folder):
    model = Model()
    route = f"#/steer?latent={FAR}&scale=3&latent={DENSE}&scale=-1&how=add&prompt=%3Cb%3Ea&n=7&temperature=0.5&seed=4"
    dom = view(model, route, '$("button.main").click(); await until(ended);')
    (asked,) = model.asked
    index = test_dashboard.read_index(folder)
    assert [each.latent for each in asked.latents] == [FAR, DENSE]
    expected = [3 * index["max"][FAR], -index["max"][DENSE]]
    assert [each.value for each in asked.latents] == pytest.approx(expected, rel=1e-5)
    assert (asked.prompt, asked.how, asked.n_tokens, asked.temperature, asked.seed) == ("<b>a", "add", 7, 0.5, 4)
    for side in ("Unsteered", "Steered"):
        section = re.search(rf'<section aria-label="{side}">(.*?)</section>', dom, re.S)
        assert section is not None
        assert text(section[1]).startswith(f"{side} 2 tokens<b>a{side.lower()} {ATTACK[:-1]}" + r"\u{202e}")
    assert "<b>bold" not in dom


@needs_browser
def test_steering_says_what_is_missing_and_shows_errors_as_text(view):
    model = Model()
    drive = """
        const said = [];
        const write = async () => {
            $("button.main").click();
            await until(() => $("[role=alert]").textContent);
            said.push($("[role=alert]").textContent);
        };
        await write();
        type(field("Latent"), "%d");
        await write();
        type(field("Latent"), "%d");
        type(field("Tokens"), "0");
        await write();
        type(field("Tokens"), "4");
        type(field("Seed"), "9");
        await write();
        const pre = document.createElement("pre");
        pre.textContent = JSON.stringify(said);
        document.body.append(pre);
    """
    dom = view(model, "#/steer", drive % (DEAD, FAR))
    said = json.loads(html.unescape(dom[dom.rindex("<pre>") + 5 : dom.rindex("</pre>")]))
    assert said[0] == "Name at least one latent by its number."
    assert said[1].startswith(f"Latent {DEAD} is not active in the sample")
    assert said[2].startswith("Tokens: ")
    assert said[3] == ATTACK.replace("\u202e", r"\u202e")
    assert len(model.asked) == 1


@needs_browser
def test_a_chat_in_which_each_side_goes_on_with_its_own_answers(view):
    model = Model()
    drive = """
        for (const message of ["hello <i>", "again"]) {
            type(field("Message"), message);
            press(field("Message"), "Enter");
            await until(ended);
            await until(() => $("button.main").getAttribute("aria-disabled") === "false");
        }
    """
    dom = view(model, f"#/chat?latent={FAR}&scale=2", drive)
    first, second = model.asked
    assert [turn.content for turn in first.steered] == ["hello <i>"]
    for side, told in (("unsteered", second.unsteered), ("steered", second.steered)):
        assert [turn.role for turn in told] == ["user", "assistant", "user"]
        assert [turn.content for turn in told] == ["hello <i>", f"{side} {ATTACK}", "again"]
    assert text(dom).count("You ") == 2
    assert "You hello <i>" in text(dom)


@needs_browser
def test_what_the_model_cannot_do_is_said_on_the_page(view):
    assert "no template; with a dictionary of an instruct model" in text(view(Model(noChat="no template"), "#/chat"))
    assert "it runs elsewhere" in text(view(Model(hows=[], noSteering="it runs elsewhere"), "#/steer"))
    said = text(view(None, "#/text"))
    assert "No model is at hand: </script><img src=x" in said


@needs_browser
def test_a_latents_page_leads_to_steering_with_it(view):
    dom = view(Model(), f"#/latent/{FAR}")
    assert f'<a href="#/steer?latent={FAR}&amp;scale=5">Steer with it</a>' in dom
    links = re.findall(r'<a href="#/([a-z]*)"[^>]*>(Latents|Text|Steer|Chat)</a>', dom)
    assert links == [("", "Latents"), ("text", "Text"), ("steer", "Steer"), ("chat", "Chat")]


@needs_browser
def test_what_is_typed_stays_when_the_page_is_drawn_anew(view):
    """As when labels have come, of which a million take a second."""
    model = Model()
    drive = """
        type($("textarea"), "typed later");
        await wait(400);
        $("textarea").focus();
        for (let i = 0; i < 2; i++) await render();
        document.documentElement.dataset.at = `${document.activeElement.tagName} ${document.activeElement.value}`;
    """
    dom = view(model, f"#/text?text=typed&latent={FAR}", drive)
    assert 'data-at="TEXTAREA typed later"' in dom
    assert set(model.asked) == {"typed", "typed later"}
    assert len(model.asked) == 2
