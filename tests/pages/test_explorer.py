"""What the local server asks of the model: latents, text and chats against the library."""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sae_jax import lm
from sae_jax.evaluation import prompts, steering
from sae_jax.pages import explorer
from sae_jax.pages.explorer import Explorer, Steered, SteerRequest, TextRequest, Turn
from sae_jax.saes import init, topk
from sae_jax.types import UsageError, UserError
from tests.lm import instruct

HOOK = lm.Hook(1, "resid_post")
TEXT = "def area(width, height):\n    return width * height  # é🙂"


def subject_of(reference="bundled"):
    """A dictionary at random in a language model."""
    model = lm.load(reference)
    ids = np.random.default_rng(0).integers(1, model.spec.n_vocab, (8, 32))
    acts = lm.run(model, jnp.asarray(ids), capture=[HOOK], logits=False).acts[HOOK]
    rows = np.asarray(acts, np.float32).reshape(-1, acts.shape[-1])
    config = topk.Config(n_latents=64, k=4, dtype="float32", input_norm="none")
    sae = config.init(jax.random.key(0), init.sample_statistics(rows, config.input_norm))
    tokenizer = lm.tokenizer(reference)
    return prompts.Subject(sae, model, tokenizer, (HOOK,), (HOOK,), tokenizer.separator_id)


@pytest.fixture(scope="module")
def subject():
    return subject_of()


def written(sides):
    """{side: (text, why it ended)} of what is written in turns."""
    found = {}
    for side, events in sides.items():
        events = list(events)
        found[side] = "".join(event["text"] for event in events), events[-1]["end"]
    return found


def test_latents_of_a_text_are_those_of_the_library(subject):
    tokens, latents, values = prompts.active(subject, TEXT, 4)
    found = Explorer(subject).latents(TextRequest(TEXT))
    assert found["tokens"] == tokens
    assert found["nActive"] == (values > 0).sum(1).tolist()
    dense = np.zeros((len(tokens), 64))
    np.put_along_axis(dense, latents, values, axis=1)
    for at, (pairs, of_token) in enumerate(zip(found["atTokens"], values, strict=True)):
        n = int((of_token > 0).sum())
        assert pairs[::2] == latents[at, :n].tolist()
        np.testing.assert_allclose(pairs[1::2], of_token[:n], rtol=1e-4)
    ranked = {latent: rest for latent, *rest in found["ranked"]}
    assert set(ranked) == set(np.flatnonzero(dense.any(0)))
    assert found["nRanked"] == len(ranked)
    for latent, numbers in ranked.items():
        column = dense[:, latent]
        np.testing.assert_allclose(numbers, [column.max(), column.sum(), (column > 0).sum()], rtol=1e-4)
        np.testing.assert_allclose(Explorer(subject).latents(TextRequest(TEXT, latent))["values"], column, rtol=1e-4)


def test_of_many_latents_the_first_by_each_order_are_told(subject, monkeypatch):
    everything = Explorer(subject).latents(TextRequest(TEXT))
    assert everything["values"] is None
    ranked = np.array(everything["ranked"])
    monkeypatch.setattr(explorer, "N_RANKED", 2)
    first = {row[0] for row in Explorer(subject).latents(TextRequest(TEXT))["ranked"]}
    assert first == {
        latent for by in (1, 2, 3) for latent in ranked[np.argsort(-ranked[:, by], kind="stable")[:2], 0].astype(int)
    }


def test_a_latent_that_is_silent_is_told_so_and_another_refused(subject):
    active = {row[0] for row in Explorer(subject).latents(TextRequest(TEXT))["ranked"]}
    silent = min({*range(64)} - active)
    found = Explorer(subject).latents(TextRequest(TEXT, silent))
    assert found["values"] == [0] * len(found["tokens"])
    with pytest.raises(UserError, match="latent 64 is outside 0 to 63"):
        Explorer(subject).latents(TextRequest(TEXT, 64))


@pytest.mark.parametrize("how", ["add", "norm"])
def test_text_is_what_generate_writes_with_and_without(subject, how):
    asked = SteerRequest([Steered(3, 40.0), Steered(7, 20.0)], prompt=TEXT, how=how, norm=0.8, n_tokens=9)
    ids = subject.ids(TEXT)
    scale = 0.8 if how == "norm" else 1.0
    values = np.array([40, 20], np.float32)
    expected = steering.write(subject, ids[None], [3, 7], values, [scale], how, n_new=9)
    tail = subject.tokenizer.decode(ids[-1:])
    texts = [subject.tokenizer.decode([ids[-1], *new[0]])[len(tail) :] for _, new in expected]
    found = written(Explorer(subject).sides(asked))
    assert [found[side][0] for side in ("unsteered", "steered")] == texts
    assert texts[0] != texts[1]
    assert found["steered"][1] == "9 tokens"


def test_samples_follow_the_seed(subject):
    def text(seed, temperature=2.0):
        settings = {"prompt": TEXT, "n_tokens": 6, "temperature": temperature, "seed": seed}
        return written(Explorer(subject).sides(SteerRequest([Steered(3, 1.0)], **settings)))["unsteered"][0]

    assert text(0) == text(0)
    assert text(0) != text(1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompt": ""}, "the text is empty"),
        ({"prompt": None}, "give a prompt, or messages of both sides"),
        ({"prompt": "word " * 500}, "tokens, and the model has room for"),
        ({"n_tokens": 0}, "n_new=0"),
        ({"n_tokens": 10**9}, "n_new=1000000000 do not fit"),
        ({"temperature": -1.0}, "temperature=-1"),
        ({"seed": -1}, "seed=-1 must be at least 0"),
        ({"latents": []}, "name at least one latent"),
        ({"latents": [Steered(64, 1.0)]}, "latent 64 does not exist; choose 0 to 63"),
        ({"latents": [Steered(1, 1.0), Steered(1, 2.0)]}, "one is there twice"),
        ({"latents": [Steered(1, 1e300)]}, r"strength 1e\+300 is too large"),
        ({"latents": [Steered(1, float("inf"))]}, "strength inf is too large"),
        ({"prompt": None, "unsteered": [Turn("user", "a")], "steered": [Turn("user", "a")]}, "has no chat template"),
    ],
)
def test_what_cannot_be_written_is_refused_at_once(subject, changes, message):
    with pytest.raises(UsageError, match=message):
        Explorer(subject).sides(SteerRequest(**{"latents": [Steered(3, 1.0)], "prompt": "a", **changes}))


def test_logits_that_are_no_numbers_are_said_and_not_taken_for_text(subject, monkeypatch):
    monkeypatch.setattr(steering, "_edit", lambda how, at: nan_edit)
    steered = Explorer(subject).sides(SteerRequest([Steered(3, 1.0)], prompt="a", n_tokens=3))["steered"]
    with pytest.raises(UserError, match="logits are no numbers; use a smaller one"):
        list(steered)


def nan_edit(x_BTX, args):
    return x_BTX * jnp.nan


def test_programs_are_compiled_before_they_are_needed(subject):
    warmed = list(Explorer(subject).warm_up())
    assert warmed == [*(f"texts of {n} tokens" for n in (32, 64, 96, 128)), "steering"]


def test_a_character_of_several_tokens_comes_whole(subject):
    tokenizer = subject.tokenizer
    text = " é🙂 ok"
    ids = tokenizer.encode([text])[0]
    assert len(ids) > len(text)  # the bundled vocabulary spells these in bytes
    events = list(explorer._texts(tokenizer, np.array([tokenizer.separator_id]), iter(ids), frozenset()))
    assert "".join(event["text"] for event in events) == text
    assert not any("\ufffd" in event["text"] for event in events)
    cut = list(explorer._texts(tokenizer, np.array([tokenizer.separator_id]), iter(ids[:4]), frozenset()))
    assert "".join(event["text"] for event in cut) == tokenizer.decode(ids[:4])


# ---- chat


@pytest.fixture(scope="module")
def chatting(tmp_path_factory):
    return subject_of(str(instruct.write(tmp_path_factory.mktemp("instruct") / "lm")))


def test_both_sides_go_on_with_their_own_answers(chatting, monkeypatch):
    seen = []

    def stream(subject, ids_T, *rest, **settings):
        seen.append(subject.tokenizer.decode(ids_T))
        return iter(())

    monkeypatch.setattr(steering, "stream", stream)
    told = {
        side: [Turn("user", "hello"), Turn("assistant", f"I am {side}"), Turn("user", "again")]
        for side in ("unsteered", "steered")
    }
    explored = Explorer(chatting)
    explored.sides(SteerRequest([Steered(3, 1.0)], **told))
    for side, text in zip(("unsteered", "steered"), seen, strict=True):
        assert text == (
            "<|im_start|>user\nhello<|im_end|>\n"
            f"<|im_start|>assistant\nI am {side}<|im_end|>\n"
            "<|im_start|>user\nagain<|im_end|>\n<|im_start|>assistant\n"
        )
    assert explored.about()["noChat"] is None


def test_an_answer_ends_where_the_template_ends_it(chatting, monkeypatch):
    end = chatting.tokenizer.vocabulary["<|im_end|>"]
    begin, never = chatting.tokenizer.encode(["well", " more"])
    monkeypatch.setattr(steering, "stream", lambda *rest, **settings: itertools.chain(begin, [end], never))
    one = [Turn("user", "hello")]
    found = written(Explorer(chatting).sides(SteerRequest([Steered(3, 1.0)], unsteered=one, steered=one)))
    assert found == dict.fromkeys(("unsteered", "steered"), ("well", "the answer ends"))
    found = written(Explorer(chatting).sides(SteerRequest([Steered(3, 1.0)], prompt="hello")))
    assert found["steered"][0] == "well<|im_end|> more"


def test_a_base_model_has_no_chat(subject):
    assert Explorer(subject).about() == {
        "model": "bundled",
        "nContext": 128,
        "hows": ["clamp", "add", "norm"],
        "noSteering": None,
        "noChat": "bundled has no chat template, as base models have none",
    }
