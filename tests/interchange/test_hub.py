"""The hub, against a server on this machine that speaks its protocol: what is read, what is written, what is said."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import huggingface_hub
import jax
import numpy as np
import pytest
import yaml
from huggingface_hub import constants

import sae_jax
from sae_jax import artifact
from sae_jax.artifact import Dictionary
from sae_jax.commands import main
from sae_jax.interchange import card, hub, publish
from sae_jax.record import DataRecord, SourceRecord
from sae_jax.saes import topk
from sae_jax.types import UsageError, UserError
from tests.interchange.stub_hub import TOKEN, Repository, StubHub

NAME = "someone/saes"


@pytest.fixture
def server(tmp_path: Path, monkeypatch):
    stub = StubHub()
    _point_to(stub.url, monkeypatch)
    monkeypatch.setattr("time.sleep", lambda _: None)  # the client tries again, with pauses
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    yield stub
    stub.shutdown()
    stub.server_close()


def _point_to(url: str, monkeypatch) -> None:
    """As HF_ENDPOINT does, which the client reads when it is imported."""
    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")


def a_dictionary(**record) -> Dictionary:
    rng = np.random.default_rng(0)
    w_dec = rng.standard_normal((16, 8)).astype(np.float32)
    w_dec /= np.linalg.norm(w_dec, axis=1, keepdims=True)
    arrays = [2 * w_dec, np.zeros(16, np.float32), w_dec, np.ones(8, np.float32)]
    sae = topk.TopK(*map(jax.numpy.asarray, arrays), config=topk.Config(n_latents=16, k=3))
    return Dictionary(sae, dataclasses.replace(artifact.record_of(sae), **record))


def files_of(d: Dictionary, folder: Path) -> dict[str, bytes]:
    d.save(folder)
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def published(server: StubHub, tmp_path: Path) -> Dictionary:
    """One dictionary at the root, another one in a folder beside large files that nobody asks for."""
    d = a_dictionary()
    files = files_of(d, tmp_path / "d")
    inside = {f"layers/6/{name}": data for name, data in files.items()}
    other = {"layers/7/dictionary.safetensors": b"not asked for", "layers/README.md": b"# about"}
    server.repositories[NAME] = Repository(
        licence="mit", branches={"main": {**files, **inside, **other}, "old": inside}
    )
    return d


def same(a: Dictionary, b: Dictionary) -> bool:
    pairs = zip(jax.tree.leaves(a.sae), jax.tree.leaves(b.sae), strict=True)
    return all(np.asarray(x).tobytes() == np.asarray(y).tobytes() for x, y in pairs)


@pytest.mark.parametrize("where", ["", "/layers/6", "/layers/6@old", "/layers/6/"])
def test_a_folder_of_the_hub_is_a_dictionary_and_nothing_else_is_fetched(server, published, where) -> None:
    assert same(publish.load(f"hf:{NAME}{where}"), published)
    fetched = [path for method, path in server.requests if method == "GET" and "/resolve/" in path]
    assert len(fetched) == 2
    assert not any("layers/7" in path for path in fetched)


def test_what_was_fetched_names_its_commit_and_licence(server, published) -> None:
    fetched = hub.fetch(f"hf:{NAME}/layers/6@old")
    assert fetched.place == hub.Place(NAME, "layers/6", server.repositories[NAME].sha("old"))
    assert str(fetched.place) == f"hf:{NAME}/layers/6@{server.repositories[NAME].sha('old')}"
    assert fetched.licence == "mit"


def test_a_file_comes_with_the_settings_beside_it(server, tmp_path) -> None:
    names = ("layer_0.safetensors", "layer_1.safetensors", "wandb-config.yaml", "features.json", "README.md")
    server.repositories[NAME] = Repository(branches={"main": {name: name.encode() for name in names}})
    path = hub.fetch(f"hf:{NAME}/layer_1.safetensors").path
    assert path.read_bytes() == b"layer_1.safetensors"
    assert sorted(other.name for other in path.parent.iterdir()) == ["layer_1.safetensors", "wandb-config.yaml"]


def test_offline_the_cache_serves_what_it_has(server, published, monkeypatch) -> None:
    publish.load(f"hf:{NAME}/layers/6")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    n = len(server.requests)
    assert same(publish.load(f"hf:{NAME}/layers/6"), published)
    for where in ("/layers/7", "", "@elsewhere"):
        with pytest.raises(
            UserError, match="not in the hub's cache, and the hub is out of reach; unset HF_HUB_OFFLINE"
        ):
            publish.load(f"hf:{NAME}{where}")
    with pytest.raises(UserError, match="HF_HUB_OFFLINE is set, so the hub cannot be asked; unset it"):
        publish.push(published, NAME)
    assert len(server.requests) == n


def test_an_unreachable_hub_is_said_and_the_cache_asked(server, published, monkeypatch, capsys) -> None:
    publish.load(f"hf:{NAME}/layers/6")
    _point_to("http://127.0.0.1:9", monkeypatch)
    assert same(publish.load(f"hf:{NAME}/layers/6"), published)
    assert "the hub cannot be reached" in capsys.readouterr().err
    with pytest.raises(UserError, match="see to the network"):
        publish.load("hf:someone/else")


@pytest.mark.parametrize(
    ("reference", "faults", "message"),
    [
        ("hf:someone/nothing", {}, "there is no repository someone/nothing, or none that you may see; check the name"),
        (f"hf:{NAME}@v9", {}, "someone/saes has no revision v9; name a branch, a tag or a commit"),
        (f"hf:{NAME}/layer", {}, "there is no such folder or file; someone/saes has ., layers/6, layers/7"),
        (f"hf:{NAME}/layers", {}, "holds no dictionary itself; name one of its folders: 6, 7"),
        (f"hf:{NAME}/layers/6", {"GET /api/models": 401}, "log in with"),
        (f"hf:{NAME}/layers/6", {"GET /api/models": 403}, "cannot serve this .403.*log in"),
        (f"hf:{NAME}/layers/6", {"GET /api/models": 500}, "cannot serve this .*500.*; try again later"),
        (f"hf:{NAME}/layers/6", {"GET /api/models": "cut"}, "try again later|see to the network"),
        (f"hf:{NAME}/layers/6", {"HEAD": 404}, "cannot serve this .*404|cannot serve this"),
        (f"hf:{NAME}/layers/6", {"safetensors": "cut"}, "cannot serve this"),
    ],
)
def test_what_the_hub_refuses_is_one_line(server, published, reference, faults, message) -> None:
    server.faults |= faults
    with pytest.raises(UserError, match=message) as caught:
        publish.load(reference)
    assert "\n" not in str(caught.value)
    assert TOKEN not in str(caught.value)


@pytest.mark.parametrize(
    "reference", ["hf:alone", "hf:", "hf:a/b/../c", "hf:a/b//etc", "hf:a/b@", "hf:/a/b", "hf:a b/c"]
)
def test_what_is_no_reference_is_refused(reference) -> None:
    with pytest.raises(UsageError, match="is no place on the hub"):
        publish.load(reference)


def test_a_repository_that_names_files_outside_of_itself_writes_nothing_there(server, published, tmp_path) -> None:
    server.repositories[NAME].branches["main"] |= {"../../../../escaped": b"x", "../dictionary.json": b"x"}
    assert same(publish.load(f"hf:{NAME}"), published)
    assert not any(path.name == "escaped" for path in tmp_path.parent.rglob("*"))


def test_a_push_is_one_commit_that_loads_again(server, capsys) -> None:
    d = a_dictionary(metrics={"fvu": 0.25, "l0": 3.0, "loss_recovered": 0.9, "dead_fraction": 0.125})
    reference = publish.push(d, f"{NAME}/layers/6", private=True, licence="apache-2.0")
    repository = server.repositories[NAME]
    assert repository.private
    assert sorted(repository.branches["main"]) == [
        *("README.md", "layers/6/README.md", "layers/6/dictionary.json", "layers/6/dictionary.safetensors")
    ]
    assert sum("/commit/" in path for _, path in server.requests) == 1
    assert reference == f"hf:{NAME}/layers/6@{repository.sha('main')}"
    assert same(publish.load(reference), d)
    text = repository.branches["main"]["README.md"].decode()
    front = yaml.safe_load(text.split("---")[1])
    assert front["library_name"] == "sae_jax"
    assert front["license"] == "apache-2.0"
    assert "sparse-autoencoder" in front["tags"]
    for what in (
        "| latents | 16 |",
        "| k | 3 |",
        "(FVU) | 0.25 |",
        "| dead latents | 12.50% |",
        f'load("hf:{NAME}/layers/6")',
    ):
        assert what in text
    assert TOKEN not in text + str(capsys.readouterr())
    # A second one beside it leaves the card of the repository as it is; the same one again is no mixture.
    publish.push(d, f"{NAME}/layers/7")
    publish.push(d, f"{NAME}/layers/6")
    assert repository.branches["main"]["README.md"].decode() == text
    assert f'"hf:{NAME}/layers/7"' in repository.branches["main"]["layers/7/README.md"].decode()


def test_a_push_to_a_branch(server) -> None:
    d = a_dictionary()
    publish.push(d, NAME)
    publish.push(d, f"{NAME}/b", revision="trial")
    assert "b/dictionary.json" in server.repositories[NAME].branches["trial"]
    assert "b/dictionary.json" not in server.repositories[NAME].branches["main"]


def test_a_push_leaves_no_mixture_and_no_public_secret(server) -> None:
    d = a_dictionary()
    server.repositories[NAME] = Repository(branches={"main": {"a/sae_weights.safetensors": b"", "a/README.md": b""}})
    with pytest.raises(UsageError, match=r"holds sae_weights.safetensors already, which this push would leave"):
        publish.push(d, f"{NAME}/a")
    with pytest.raises(UsageError, match="someone/saes is there and public"):
        publish.push(d, f"{NAME}/b", private=True)
    for repo in ("alone", "a/../b", ""):
        with pytest.raises(UsageError, match="is no place on the hub to push to"):
            publish.push(d, repo)
    assert len(server.repositories[NAME].branches["main"]) == 2


@pytest.mark.parametrize(
    ("faults", "message"),
    [
        ({"/commit/": 500}, "cannot serve this .*500"),
        ({"PUT /upload/": 500}, "cannot serve this .*500"),
        ({"/preupload/": 403}, "cannot serve this .403"),
        ({"/commit/": "cut"}, "cannot serve this"),
    ],
)
def test_a_push_that_fails_says_so_and_commits_nothing(server, faults, message, monkeypatch) -> None:
    monkeypatch.setattr("time.sleep", lambda _: None)
    server.repositories[NAME] = Repository()
    server.faults |= faults
    with pytest.raises(UserError, match=message) as caught:
        publish.push(a_dictionary(), NAME)
    assert "\n" not in str(caught.value)
    assert TOKEN not in str(caught.value)
    assert server.repositories[NAME].branches["main"] == {}


def test_a_push_needs_a_login(server, monkeypatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    with pytest.raises(UserError, match=r"log in with `hf auth login`, or set HF_TOKEN") as caught:
        publish.push(a_dictionary(), NAME)
    assert "hf_wrong" not in str(caught.value)
    assert server.repositories == {}


def test_only_the_first_process_uploads(server, monkeypatch) -> None:
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    assert publish.push(a_dictionary(), NAME) == f"hf:{NAME}"
    assert server.requests == []


def test_the_card_names_the_model_and_no_folder_of_this_machine() -> None:
    source = SourceRecord("resid_post.6", 8, "resid_post.6", "openai-community/gpt2@main")
    record = a_dictionary(encodes=(source,), reconstructs=(source,)).record
    record = dataclasses.replace(
        record, data=DataRecord("x", "/home/me/set", "gpt2", "/home/me/book.txt"), steps=5, tokens=640
    )
    text = card.write(record, NAME, "l6", "saelens", None)
    front = yaml.safe_load(text.split("---")[1])
    assert (front["library_name"], front["base_model"]) == ("saelens", "openai-community/gpt2")
    assert "license" not in front
    assert "/home/me" not in text
    assert "| text | book.txt |" in text
    assert "640 tokens in 5 steps" in text
    assert 'snapshot_download("someone/saes") + "/l6"' in text
    local = dataclasses.replace(source, model="/home/me/model")
    text = card.write(dataclasses.replace(record, encodes=(local,), reconstructs=(local,)), NAME, "", "sae_jax", None)
    assert "base_model" not in text
    assert "resid_post.6 of model" in text


REGISTRY = """
gpt2-small-res-jb:
  conversion_func: connor_rob_hook_z
  repo_id: someone/saes
  saes:
  - id: blocks.6.hook_resid_post
    path: layers/6
    l0: 3.0
  - id: layers/6
other:
  repo_id: someone/else
  saes: []
"""


def test_names_of_saelens_come_from_its_registry(server, published, tmp_path, monkeypatch) -> None:
    path = tmp_path / hub.REGISTRY
    path.write_text(REGISTRY)
    monkeypatch.setattr(hub, "_registry", lambda: path)
    assert same(publish.load("saelens:gpt2-small-res-jb/blocks.6.hook_resid_post"), published)
    assert same(publish.load("saelens:gpt2-small-res-jb/layers/6"), published)  # a path that is the name
    for name, message in {
        "gpt2-small-res-jb/blocks.9": "release gpt2-small-res-jb has no blocks.9; there are blocks.6.hook_resid_post",
        "gpt2-small-res-j/x": "no such release; did you mean gpt2-small-res-jb",
        "gpt2-small-res-jb": "write saelens:RELEASE/ID",
    }.items():
        with pytest.raises(UsageError, match=message):
            publish.load(f"saelens:{name}")


def test_without_saelens_it_says_what_to_install() -> None:
    if any(d.metadata["Name"] == "sae-lens" for d in hub.importlib.metadata.distributions()):
        pytest.skip("SAELens is installed")
    with pytest.raises(UserError, match="not installed here; pip install sae-lens"):
        publish.load("saelens:a/b")


def test_the_client_is_the_one_this_is_written_for() -> None:
    assert issubclass(huggingface_hub.errors.HfHubHTTPError, huggingface_hub.errors.HTTPError)


def test_what_is_published_for_another_library_comes_back_and_says_where_from(server, tmp_path) -> None:
    d = a_dictionary()
    reference = publish.push(d, f"{NAME}/layers/6", "saelens", licence="mit")
    repository = server.repositories[NAME]
    assert sorted(repository.branches["main"]) == [
        *("README.md", "layers/6/README.md", "layers/6/cfg.json", "layers/6/sae_weights.safetensors")
    ]
    assert "library_name: saelens" in repository.branches["main"]["README.md"].decode()
    repository.licence = "mit"
    again = publish.load(reference)
    assert same(again, d)
    origin = again.record.origin
    assert origin is not None
    assert (origin.format, origin.place, origin.licence) == ("saelens", f"hf:{NAME}/layers/6", "mit")
    assert origin.revision == repository.sha("main")
    # Published again, it keeps the licence that it came with; and a copy of ours keeps its first origin.
    publish.push(again, "someone/copy")
    text = server.repositories["someone/copy"].branches["main"]["README.md"].decode()
    assert "license: mit" in text
    assert f"| made from | hf:{NAME}/layers/6 at {origin.revision} (saelens) |" in text
    assert publish.load("hf:someone/copy").record.origin == origin


def test_the_commands_fetch_and_publish(server, published, tmp_path, capsys) -> None:
    out = tmp_path / "imported"
    assert main.main(["import", f"hf:{NAME}/layers/6@old", "--out", str(out)]) == 0
    origin = artifact.load(out).record.origin
    assert origin is not None
    assert (origin.format, origin.place) == ("sae_jax", f"hf:{NAME}/layers/6")
    assert origin.revision == server.repositories[NAME].sha("old")
    words = ["export", str(out), "--format=saelens", f"--out={tmp_path / 'exported'}"]
    assert main.main([*words, "--push=someone/new/a", "--private", "--licence=mit"]) == 0
    new = server.repositories["someone/new"]
    assert new.private
    assert f"published as hf:someone/new/a@{new.sha('main')}" in " ".join(capsys.readouterr().err.split())
    assert main.main([*words, "--private"]) == 2
    assert main.main([*words, "--push=new"]) == 2


def test_what_is_measured_needs_a_folder_of_ones_own(server) -> None:
    with pytest.raises(UsageError, match="hf:a/b: what is measured is written beside a dictionary; import it"):
        sae_jax.evaluate("hf:a/b")
    with pytest.raises(UserError, match="there is no repository a/b"):
        sae_jax.active("hf:a/b", "text")
