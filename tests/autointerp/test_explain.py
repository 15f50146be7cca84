"""Labels by a judge that follows a rule, and by one that misbehaves: what comes of it, what is paid, what is said."""

import functools
import json
import threading

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import sae_jax
from sae_jax import lm
from sae_jax.analysis.store import Store
from sae_jax.autointerp import explain as module
from sae_jax.autointerp import judge as judges
from sae_jax.autointerp import questions
from sae_jax.autointerp.fragments import Fragment, Texts
from sae_jax.autointerp.judge import Judge, JudgeConfig, JudgeError, RequestError, UselessError
from sae_jax.commands import main as cli
from sae_jax.types import UsageError, UserError
from tests.autointerp.conftest import N_LATENTS, make_store, words
from tests.autointerp.judges import JudgeServer


@functools.cache
def token_of(latent):
    return lm.tokenizer("bundled").tokens([words()[latent]])[0]


def of_latent(latent, what):
    """Misbehave in requests about one latent."""
    return lambda prompt: what if f"<<{token_of(latent)}>>" in prompt else None


@pytest.mark.parametrize("score", ["simulation", "detection"])
def test_an_honest_judge_explains_and_predicts(store, score):
    with JudgeServer() as server:
        found = sae_jax.explain(store, server.url, "rule", latents=range(N_LATENTS), score=score, batch=4)
    assert not found.failures
    assert [label["latent"] for label in found.labels] == list(range(N_LATENTS))
    for label in found.labels:
        assert label["explanation"] == f"the token {json.dumps(token_of(label['latent']))}"
        assert [label[name] for name in module.SCORES[score]] == pytest.approx([1, 1])
        assert label["model"] == "rule"
    assert np.hstack(found.mean(score)) == pytest.approx([1, 1, 1])
    assert module.read_labels(store) == {label["latent"]: label for label in found.labels}
    # A request for the explanation, and ten or fourteen texts in batches of four.
    assert len(server.prompts) == N_LATENTS * (1 + {"simulation": 3, "detection": 4}[score])
    assert found.usage.prompt_tokens == 100 * len(server.prompts)
    assert found.usage.report((2.0, 30.0)).endswith(f"; {len(server.prompts) * 5e-4:.4g} at the prices given")
    assert "/v1" not in json.dumps(found.labels)


def test_a_wrong_explanation_scores_as_chance(store):
    def wrong(prompt):
        return 'the token "nowhere"' if "have in common" in prompt else None

    with JudgeServer(wrong) as server:
        simulated = sae_jax.explain(store, server.url, "wrong", latents=[0, 3], score="simulation")
        detected = sae_jax.explain(store, server.url, "wrong", latents=[0, 3], score="detection")
    assert [label["simulation"] for label in simulated.labels] == [0, 0]
    for label in detected.labels:
        assert label["detection_balanced"] == 0.5
        assert label["detection"] < 0.75
        assert label["simulation"] == 0, "the same explanation keeps the score it had"


def test_texts_that_are_scored_are_not_those_that_were_shown(store):
    texts = Texts.of(Store(store), None)
    for draw in (texts.simulated, texts.shuffled):
        drawn = draw(2, np.random.default_rng(0))
        fragments = [*drawn.top, *drawn.random] if draw == texts.simulated else drawn.fragments
        assert len(fragments) == {texts.simulated: 10, texts.shuffled: 14}[draw]
        seen = {f.tokens for f in texts.strongest(2)}
        assert len({f.tokens for f in fragments} | seen) == len(fragments) + len(seen) == len(fragments) + 5
        for fragment in fragments:
            assert 60 <= len(fragment.tokens) <= 64
            assert "<|endoftext|>" not in fragment.tokens
            fires = [token == token_of(2) for token in fragment.tokens]
            np.testing.assert_array_equal(fragment.values > 0, fires)


def test_nothing_is_paid_for_twice(store):
    with JudgeServer() as server:
        first = sae_jax.explain(store, server.url, "rule", n=4, score="detection")
        paid = len(server.prompts)
        second = sae_jax.explain(store, server.url, "rule", n=4, score="detection")
        assert len(server.prompts) == paid == second.usage.kept == first.usage.requests
        assert second.labels == first.labels
        assert second.usage.requests == second.usage.prompt_tokens == 0
        more = sae_jax.explain(store, server.url, "rule", n=4, score="simulation")
        assert more.usage.kept == 4, "explanations are there"
        sae_jax.explain(store, server.url, "another", n=4)
        assert len(server.prompts) == paid + more.usage.requests + 4
    lines = [json.loads(line) for line in (store / "labels.jsonl").read_text().splitlines()]
    assert len(lines) == 8, "one of each model"
    assert {"detection", "simulation"} < lines[0].keys()


ONCE = ["drop", "cut", b"no JSON", b'{"choices": []}', b"[" * 10**5, "no JSON at all"]
ONCE += [(429, {"Retry-After": "0"}, "slow down"), (503, {}, "busy"), (429, {"Retry-After": "soon"}, "slow down")]


@pytest.mark.parametrize("what", ONCE, ids=lambda what: str(what)[:20])
def test_what_goes_wrong_once_is_asked_again(store, what):
    waiting = [what]

    def once(prompt):
        is_score = "In which of these passages" in prompt
        return waiting.pop() if waiting and is_score else None

    with JudgeServer(once) as server:
        found = sae_jax.explain(store, server.url, "rule", latents=[5], score="detection", batch=20)
        assert not found.failures
        assert found.labels[0]["detection"] == 1
        assert len(server.prompts) == 3


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("drop", "a broken connection"),
        ("cut", "a broken connection"),
        ("stream", "no whole answer in 3 s"),
        ("", "an answer of no use (an explanation of 0 characters)"),
        (b"no JSON", "what is no answer of a chat"),
        ((400, {}, "the prompt is too long"), "400 (the prompt is too long)"),
        ((500, {}, "out of memory"), "500 (out of memory)"),
        ((429, {"Retry-After": "86400"}, "no more today"), "429 (no more today), which asks to wait 86,400 s"),
    ],
    ids=lambda x: str(x)[:20],
)
def test_what_goes_wrong_for_one_latent_is_told_and_resumed(store, capsys, what, said):
    words = ["explain", str(store), "--model=rule", "--latents", "1", "2", "3"]
    words += ["--timeout=3", "--tries=1"] if what == "stream" else ["--tries=2"]
    with JudgeServer(of_latent(2, what)) as server:
        words.append(f"--endpoint={server.url}")
        assert cli.main(words) == 3
        out, err = capsys.readouterr()
        assert [line.split()[0] for line in out.splitlines()] == ["latent", "1", "3"]
        assert f"latent 2: {said}" in err
        assert "2 latents have a label, and 1 have none; the same command asks again" in err
        assert set(module.read_labels(store)) == {1, 3}
        server.behave = lambda prompt: None
        paid = len(server.prompts)
        assert cli.main(words) == 0
        assert len(server.prompts) == paid + 1
        assert "1 requests, 2 answers kept from before" in capsys.readouterr().err
    assert set(module.read_labels(store)) == {1, 2, 3}


@pytest.mark.parametrize("what", ["stream", "headers"])
def test_a_byte_now_and_then_does_not_hold_a_request_up(store, what):
    with JudgeServer(lambda prompt: what) as server:
        found = sae_jax.explain(store, server.url, "rule", latents=[2], timeout=0.2, tries=3)
        assert found.failures == {2: "no whole answer in 0.2 s"}
        assert found.usage.requests == 3


def test_an_endpoint_that_never_works_is_given_up(store, capsys):
    with JudgeServer(lambda prompt: (500, {}, "down")) as server:
        words = ["explain", str(store), f"--endpoint={server.url}", "--model=rule", "--n=8", "--tries=2"]
        assert cli.main([*words, "--concurrency=1"]) == 1
        assert len(server.prompts) == 2 * judges.GIVE_UP_AFTER
    err = capsys.readouterr().err
    assert "5 requests in a row came to nothing, the last as 500 (down); see the endpoint" in err.splitlines()[-1]
    assert not module.read_labels(store)


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ((401, {}, "Incorrect API key provided: s3cret-0123"), r"refuses with 401 \(.*<key>\); see the key in MY_KEY"),
        ((403, {}, "no"), "refuses with 403"),
        ((404, {}, "no such model"), r"has no rule, or is no endpoint: 404 \(no such model\)"),
        ((307, {"Location": "http://elsewhere.example/v1"}, ""), "sends on to http://elsewhere.example/v1 with 307"),
    ],
    ids=["401", "403", "404", "307"],
)
def test_what_no_request_can_mend_ends_the_run_at_once(store, monkeypatch, what, said):
    monkeypatch.setenv("MY_KEY", "s3cret-0123")
    with JudgeServer(lambda prompt: what) as server:
        with pytest.raises(JudgeError, match=said) as error:
            sae_jax.explain(store, server.url, "rule", n=8, key_env="MY_KEY", concurrency=1)
        assert len(server.prompts) == 1
        assert server.keys == ["Bearer s3cret-0123"]
        assert "s3cret" not in str(error.value)
        server.behave = lambda prompt: "the key was s3cret-0123"
        sae_jax.explain(store, server.url, "rule", n=8, key_env="MY_KEY")
    assert {label["explanation"] for label in module.read_labels(store).values()} == {"the key was <key>"}
    for file in store.rglob("*"):
        assert file.is_dir() or b"s3cret" not in file.read_bytes()


def test_a_key_that_is_withdrawn_on_the_way_leaves_what_was_answered(store):
    asked = threading.Lock()

    def withdrawn(prompt):
        with asked:
            return (401, {}, "expired") if len(server.prompts) > 3 else None

    with JudgeServer(withdrawn) as server:
        found = sae_jax.explain(store, server.url, "rule", latents=range(N_LATENTS), concurrency=1)
    assert len(found.labels) == 3
    assert len(found.failures) == N_LATENTS - 3
    assert all("refuses with 401 (expired); give its key as SAE_JAX_API_KEY" in w for w in found.failures.values())


def test_bad_input_is_one_line(store, tmp_path, capsys):
    with JudgeServer() as server:
        for words, said in (
            (["--latents", "99"], "latent 99 does not exist; choose 0 to 7"),
            ([], "name latents, or say how many are drawn"),
            (["--n=3", "--latents", "1"], "one of the two"),
            (["--n=0"], "n=0 must be at least 1"),
            (["--n=1", "--batch=0"], "batch=0 must be at least 1"),
            (["--n=1", "--tries=0"], "tries=0 must be at least 1"),
            (["--n=1", "--timeout=0"], "timeout=0.0 must be above 0"),
            (["--n=1", "--endpoint=localhost:80"], "endpoint='localhost:80' is no URL"),
            (["--n=1", "--endpoint=http://me:secret@host/v1"], "has a password; give the key in the environment"),
            (["--n=1", "--endpoint=http://host:99999/v1"], "is no URL"),
            (["--n=1", "--sheet=x.csv"], "give --endpoint and --model, or --sheet, or --ratings"),
            (["--n=1", "--baseline=x"], "--baseline is for --sheet"),
        ):
            assert cli.main(["explain", str(store), f"--endpoint={server.url}", "--model=rule", *words]) == 2, words
            line = capsys.readouterr().err
            assert said in line
            assert line.count("\n") == 1
        assert not server.prompts
        with pytest.raises(UserError, match="is no store of latents; make one with sae-jax collect"):
            sae_jax.explain(tmp_path / "nothing", server.url, "rule", n=1)
        empty = make_store(tmp_path / "empty", value=lambda latent, n: 0.0)
        with pytest.raises(UserError, match="no latent fires in 5 texts or more; collect more --tokens"):
            sae_jax.explain(empty, server.url, "rule", n=1)
    with pytest.raises(JudgeError, match=r"nothing answers at .*; start the endpoint, or give another"):
        sae_jax.explain(store, server.url, "rule", n=4)


def test_a_latent_that_fires_in_few_texts_is_told_and_never_drawn(tmp_path):
    store = make_store(tmp_path / "store", fires=lambda latent, seq: latent > 2 or seq < 20)
    with JudgeServer() as server:
        found = sae_jax.explain(store, server.url, "rule", latents=[1, 5], score="simulation")
        assert found.failures == {1: "it fires in 9 texts, and simulation takes 15"}
        assert [label["latent"] for label in found.labels] == [5]
        drawn = sae_jax.explain(store, server.url, "rule", n=8, score="simulation")
    assert [label["latent"] for label in drawn.labels] == [3, 4, 5, 6, 7]


def test_turns_keep_the_rate_and_wait_for_all_when_told(tmp_path, monkeypatch):
    clock = [100.0]

    class Stopped:
        def wait(self, seconds):
            clock[0] += seconds
            return False

    with Judge(JudgeConfig("http://host", "m", per_minute=30), tmp_path / "answers.jsonl") as judge:
        assert judge.config.url == "http://host/v1/chat/completions"
        judge._stopped = Stopped()
        monkeypatch.setattr(judges.time, "monotonic", lambda: clock[0])
        turns = []
        for _ in range(3):
            judge._wait_for_turn()
            turns.append(clock[0])
        assert turns == [100, 102, 104]
        answers = [judges._AgainError("429", 25.0), "fine"]

        def send(data):
            turns.append(clock[0])
            answer = answers.pop(0)
            if isinstance(answer, Exception):
                raise answer
            return answer

        judge._send = send
        assert judge.ask("question", str.upper) == "FINE"
        assert turns[3:] == [106, 131]
        monkeypatch.undo()
        judge._stopped = threading.Event()


def test_retry_after_may_be_a_date():
    assert judges._seconds("Wed, 21 Oct 2015 07:28:00 GMT") == 0
    assert judges._seconds("Wed, 21 Oct 2065 07:28:00 GMT") > 10**8
    assert judges._seconds("nan") is judges._seconds("later") is judges._seconds(None) is None


FRAGMENTS = [Fragment(("a", "b", "c"), np.zeros(3, np.float32)), Fragment(("d",), np.ones(1, np.float32))]


def test_answers_are_read_whatever_stands_around_them_and_refused_if_they_do_not_fit():
    read = questions.read_simulation('<think>{"1"</think>Sure! {"1": {"2": 10, "0": 1.5}, "2": {}} Done.', FRAGMENTS)
    np.testing.assert_array_equal(np.concatenate(read), [1.5, 0, 10, 0])
    for wrong in (
        *("", "{", '{"1": {}}', '{"1": {"3": 1}, "2": {}}', '{"1": {"0": 11}, "2": {}}', '{"1": {"0": NaN}, "2": {}}'),
        *('{"1": {"-1": 1}, "2": {}}', '{"1": [1], "2": {}}', '{"1": {}, "2": {}, "3": {}}', '{"a":' * 10**5),
    ):
        with pytest.raises(UselessError):
            questions.read_simulation(wrong, FRAGMENTS)
    assert questions.read_detection("Passages [2].", FRAGMENTS).tolist() == [False, True]
    for wrong in ("none", "[3]", "[0]", '["a"]', "[" * 10**5, "[1.5]"):
        with pytest.raises(UselessError):
            questions.read_detection(wrong, FRAGMENTS)
    assert questions.read_explanation(' "two\n lines" ') == "two lines"
    with pytest.raises(UselessError):
        questions.read_explanation("x" * 501)


@given(st.lists(st.tuples(st.floats(-5, 5), st.floats(-5, 5)), min_size=1, max_size=9))
def test_correlation(pairs):
    a, b = np.array(pairs).T
    value = module.correlation(a, b)
    if np.ptp(a) == 0 or np.ptp(b) == 0:
        assert value == 0
    elif np.ptp(a) > 1e-3 and np.ptp(b) > 1e-3:
        da, db = a - a.mean(), b - b.mean()
        assert value == pytest.approx((da @ db) / np.sqrt((da @ da) * (db @ db)), abs=1e-6)


def test_what_is_withheld_is_what_is_said(store):
    """The judge is told strengths from 1 to 10 of the texts that it explains, and none of those that it predicts."""
    with JudgeServer() as server:
        sae_jax.explain(store, server.url, "rule", latents=[4], score="simulation")
    explanation, *others = server.prompts
    assert f"<<{token_of(4)}>>(10)" in explanation
    assert all("<<" not in prompt for prompt in others)
    with Judge(JudgeConfig("http://h", "m"), store / "answers.jsonl") as judge:
        judge._stopped.set()
        with pytest.raises(RequestError, match="asking has ended"):
            judge.ask("after the end", str)


def test_a_latent_is_named_once(store):
    with pytest.raises(UsageError, match="latent -1 does not exist"):
        sae_jax.explain(store, "http://h", "m", latents=[-1])
