"""Sets of conversations: the roles that have rows, and what is refused before anything runs."""

from __future__ import annotations

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sae_jax import lm
from sae_jax.activations.fields import Fields
from sae_jax.activations.harvest import HarvestConfig, harvest
from sae_jax.activations.store import open_activations
from sae_jax.activations.text import documents, scan
from sae_jax.evaluation.text import held_out
from sae_jax.lm.chat import read_template
from sae_jax.types import Sites, UsageError, UserError
from tests.lm import instruct

CHAT = Fields("messages", is_chat=True)
ANSWERS = [f"def f{i}(x): return x + {i}" for i in range(40)]


def conversation(answer):
    return [{"role": "user", "content": "import os, please"}, {"role": "assistant", "content": answer}]


def write(path, conversations, **more):
    path.write_text("".join(json.dumps({"messages": each, "text": "x", **more}) + "\n" for each in conversations))
    return str(path)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return instruct.write(tmp_path_factory.mktemp("instruct") / "lm")


def settings(model, text, **others):
    common = {"model": (str(model),), "text": text, "text_column": "messages", "context": 16, "batch_tokens": 64}
    return HarvestConfig(**{**common, "hooks": ("resid_pre.0",), "chat": "assistant", **others})


def tokens_of(path):
    """Of the rows of a set, in the order of the text."""
    activations = open_activations(path)
    index = [activations.read_index(i) for i in range(activations.n_chunks)]
    token, seq, pos = (np.concatenate([part[key] for part in index]) for key in ("token", "seq", "pos"))
    return token[np.lexsort((pos, seq))].tolist()


def test_conversations_are_the_same_whatever_they_lie_in(tmp_path, monkeypatch):
    import datasets

    several = [conversation(answer) for answer in ANSWERS[:3]]
    lines = write(tmp_path / "a.jsonl", several)
    (tmp_path / "b.json").write_text(json.dumps([{"messages": each} for each in several]))
    pq.write_table(pa.table({"messages": several}), tmp_path / "c.parquet")
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: iter([{"messages": each} for each in several]))
    for text in (lines, str(tmp_path / "b.json"), str(tmp_path / "c.parquet"), "hf:owner/data"):
        assert [json.loads(each) for each in documents(text, CHAT)] == several
    scans = [scan(str(tmp_path / name), CHAT) for name in ("a.jsonl", "b.json", "c.parquet")]
    assert {(each.digest, each.roles, each.n_documents) for each in scans} == {
        (scans[0].digest, ("assistant", "user"), 3)
    }


def test_what_messages_have_beside_role_and_content_is_left_out_and_told(tmp_path, capsys):
    extra = [{"role": "user", "content": "a", "id": 3, "name": None}, {"role": "assistant", "content": None}]
    path = write(tmp_path / "a.jsonl", [extra, [], [{"role": "user", "content": ""}]])
    expected = [{"role": "user", "content": "a"}, {"role": "assistant", "content": ""}]
    assert [json.loads(each) for each in documents(path, CHAT)] == [expected]
    assert "messages also have id; the chat template is not given these" in capsys.readouterr().err
    assert scan(path, CHAT).n_empty == 2


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ("text", r'a\.jsonl:1 has no list of messages "messages" \(it holds str\); it has no list of messages'),
        ({"role": "user"}, r"it holds dict"),
        (["text"], r'message 0 has no string "role" and "content"'),
        ([{"from": "human", "value": "a"}], r'message 0 has no string "role" and "content" \(it has from, value\)'),
        ([{"role": "user", "content": [{"type": "text", "text": "a"}]}], r"message 0 has no string"),
        ([{"role": "user", "content": "\ud800"}], r"half of a surrogate pair"),
    ],
)
def test_what_is_no_conversation_is_refused(tmp_path, messages, message):
    with pytest.raises(UserError, match=message) as caught:
        list(documents(write(tmp_path / "a.jsonl", [messages]), CHAT))
    assert "\n" not in str(caught.value)


def test_files_that_can_hold_no_conversations_are_refused_or_left_out(tmp_path):
    for name in ("a.txt", "a.csv", "a.md.gz"):
        (tmp_path / name).write_text("messages\nhello\n")
        with pytest.raises(UserError, match=rf"{name} can hold no conversations; use JSON Lines or Parquet"):
            list(documents(str(tmp_path / name), CHAT))
    write(tmp_path / "b.jsonl", [conversation("yes")])
    scanned = scan(str(tmp_path), CHAT)
    assert len(scanned.files) == 1
    assert len(scanned.left_out["without conversations"]) == 3
    with pytest.raises(UsageError, match="text 'stdlib' has no conversations"):
        scan("stdlib", CHAT)
    pq.write_table(pa.table({"messages": ["a"], "turns": [[{"role": "user"}]]}), tmp_path / "c.parquet")
    with pytest.raises(UserError, match='has no list of messages in column "messages"; it has turns; choose one with'):
        scan(str(tmp_path / "c.parquet"), CHAT)


def test_rows_are_those_of_the_role(model, tmp_path):
    """Special tokens are left out as in any text, and so is what the template writes, unless all is asked for."""
    text = write(tmp_path / "a.jsonl", map(conversation, ANSWERS))
    tokenizer = lm.tokenizer(str(model))
    for role, expected in (("assistant", ANSWERS), ("user", ["import os, please"] * 40)):
        spec = harvest(settings(model, text, chat=role), str(tmp_path / role))
        assert (spec.chat, spec.chat_template_digest) == (role, read_template(str(model)).digest)
        assert open_activations(tmp_path / role).spec == spec
        # The last sequence is not full.
        rows = tokens_of(tmp_path / role)
        assert rows == [i for ids in tokenizer.encode(expected) for i in ids][: len(rows)]
        assert len(rows) > 100
    harvest(settings(model, text, chat="all"), str(tmp_path / "all"))
    rows = tokenizer.decode(tokens_of(tmp_path / "all"))
    one = "user\nimport os, please\nassistant\ndef f0(x): return x + 0\nuser\nimport os, please\n"
    assert rows.startswith(one)


def test_workers_share_conversations_too(model, tmp_path):
    text = write(tmp_path / "a.jsonl", map(conversation, ANSWERS))
    harvest(settings(model, text), str(tmp_path / "whole"))
    for shard in ((1, 2), (0, 2)):
        harvest(settings(model, text), str(tmp_path / "shared"), shard)
    assert tokens_of(tmp_path / "shared") == tokens_of(tmp_path / "whole")


@pytest.mark.parametrize(("bos", "expected"), [("{{ bos_token }}", 1), ("", 1), ("{{ bos_token }}{{ bos_token }}", 2)])
def test_there_is_one_separator_unless_the_template_writes_more(tmp_path, bos, expected):
    model = instruct.write(tmp_path / "lm", bos + instruct.CHATML)
    harvest(settings(model, write(tmp_path / "a.jsonl", map(conversation, ANSWERS))), str(tmp_path / "set"))
    activations = open_activations(tmp_path / "set")
    ids = activations.read_sequences(np.arange(4)).reshape(-1)
    separator, start = lm.tokenizer(str(model)).separator_id, lm.tokenizer(str(model)).vocabulary["<|im_start|>"]
    assert ids[: expected + 1].tolist() == [separator] * expected + [start]


def test_a_base_model_is_refused_before_it_is_read(tmp_path, monkeypatch):
    text = write(tmp_path / "a.jsonl", [conversation("yes")])
    monkeypatch.setattr(lm, "load", lambda *_, **__: pytest.fail("the weights were read"))
    with pytest.raises(UsageError, match=r"bundled has no chat template .*; use an instruct model, or leave") as caught:
        harvest(settings("bundled", text), str(tmp_path / "set"))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "set").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"chat": "asistant"}, r"harvest\.chat='asistant' is the role of no message; use one of assistant, user, all"),
        ({"text_column": "text"}, r'no list of messages "text" \(it holds str\); it has messages; choose one with'),
        ({"text_template": "{text}", "text_column": "text"}, r"leave out one of them"),
    ],
)
def test_settings_that_do_not_fit_are_refused(model, tmp_path, change, message):
    text = write(tmp_path / "a.jsonl", map(conversation, ANSWERS))
    with pytest.raises(UserError, match=message):
        harvest(settings(model, text, **change), str(tmp_path / "set"))
    assert not (tmp_path / "set").exists()


def test_a_role_has_to_be_in_the_first_conversations_of_a_dataset(model, tmp_path, monkeypatch):
    import datasets

    rows = [{"messages": conversation(answer)} for answer in ANSWERS]
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: iter(rows))
    with pytest.raises(UsageError, match="role of no message; use one of assistant, user, all"):
        harvest(settings(model, "hf:owner/data", chat="system", tokens=320), str(tmp_path / "set"))
    harvest(settings(model, "hf:owner/data", tokens=320), str(tmp_path / "set"))
    assert tokens_of(tmp_path / "set")[:3] == lm.tokenizer(str(model)).encode(ANSWERS[:1])[0][:3]


def test_a_conversation_that_the_template_refuses_is_named_with_its_file(model, tmp_path):
    text = write(tmp_path / "a.jsonl", [conversation("yes \ufdd0\ufdd1")])
    with pytest.raises(UserError, match=r"a\.jsonl: the chat template of .* that begins 'import os, please'"):
        harvest(settings(model, text), str(tmp_path / "set"))


def test_a_special_token_without_a_row_in_the_model_is_refused(model, tmp_path):
    other = instruct.write(tmp_path / "lm")
    content = json.loads((lm.locate("bundled") / "tokenizer.json").read_text())
    added = json.loads((other / "tokenizer.json").read_text())["added_tokens"]
    content["added_tokens"] += [token | {"id": token["id"] + 2} for token in added if token["id"]]
    (other / "tokenizer.json").write_text(json.dumps(content))
    text = write(tmp_path / "a.jsonl", map(conversation, ANSWERS))
    with pytest.raises(UserError, match=r"writes token id 204\d is outside 0 to 2047; the embedding has 2048 rows"):
        harvest(settings(other, text), str(tmp_path / "set"))
    assert not (tmp_path / "set").exists()


def test_evaluation_takes_the_role_and_the_template_of_the_set(tmp_path):
    model = instruct.write(tmp_path / "lm")
    text = write(tmp_path / "a.jsonl", map(conversation, ANSWERS))
    heldout = write(tmp_path / "h.jsonl", [conversation(answer.upper()) for answer in ANSWERS])
    harvest(settings(model, text, heldout=heldout), str(tmp_path / "set"))
    activations = open_activations(tmp_path / "set")
    found = held_out(activations, Sites.one("resid_pre.0"), 160)
    assert found is not None
    tokenizer = lm.tokenizer(str(model))
    rows = found.sequences[found.text].tolist()
    assert rows == [i for answer in ANSWERS for i in tokenizer.encode([answer.upper()])[0]][: len(rows)]
    assert found.rows().shape[0] == len(rows) > 10
    config = json.loads((model / "tokenizer_config.json").read_text()) | {"chat_template": "x" + instruct.CHATML}
    (model / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"the chat template of .* is not that which"):
        held_out(activations, Sites.one("resid_pre.0"), 160)
