"""Several SAEs from one pass: each as if it were alone, on any mesh, whatever happens to the others."""

from __future__ import annotations

import dataclasses
import json
import random
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
import pytest

from sae_jax import mesh as meshes
from sae_jax.activations.source import Batches, place_rows, sampler
from sae_jax.activations.store import ActivationSet, open_activations
from sae_jax.activations.stored import StoredRows
from sae_jax.artifact import load
from sae_jax.ops import auxk
from sae_jax.saes import relu, topk
from sae_jax.saes.init import sample_statistics
from sae_jax.training import loop
from sae_jax.training.checkpoint import Checkpoints
from sae_jax.training.groups import Member, group_members, initial_states
from sae_jax.training.settings import TrainConfig
from sae_jax.training.state import abstract
from sae_jax.training.step import Step
from sae_jax.types import PartialError, UsageError, UserError
from tests import hlo, runs

SAE = topk.Config(n_latents=64, k=4, dtype="float32")
TRAIN = TrainConfig(
    steps=20, batch_size=64, order_seed=0, dead_after_tokens=300, checkpoint_every=10, log_every=1, lr=1e-3, decay=0
)
# Four that share a program, and one that does not and ends earlier.
SETTINGS = {
    "plain": (SAE, TRAIN),
    "fast": (SAE, dataclasses.replace(TRAIN, lr=1e-2, ema=0.9)),
    "seeded": (SAE, dataclasses.replace(TRAIN, seed=5, clip=0.1)),
    "alive": (SAE, dataclasses.replace(TRAIN, dead_after_tokens=10**6)),
    "wide": (dataclasses.replace(SAE, n_latents=128, k=8), dataclasses.replace(TRAIN, steps=15, ema=0, clip=0)),
}
FOUR = ("plain", "fast", "seeded", "alive")


class Watched(Batches):
    """Batches of a source, noting which; they may end before a step as if the process had been killed there."""

    def __init__(self, batches: Batches, cut: int | None) -> None:
        self._batches, self._cut, self.steps = batches, cut, []
        self.row_ids, self.place = batches.row_ids, batches.place

    def batches(self, start_step: int = 0) -> Iterator[tuple[int, dict[str, np.ndarray]]]:
        for step, rows in self._batches.batches(start_step):
            if step == self._cut:
                raise KeyboardInterrupt
            self.steps.append(step)
            yield step, rows

    def row_ids(self, step: int) -> np.ndarray:
        raise NotImplementedError

    def place(self, rows, mesh):
        raise NotImplementedError


def member_of(run: Path, name: str, folder: Path | None = None, **changed) -> Member:
    sae, train = SETTINGS[name]
    train = dataclasses.replace(train, **changed)
    record = runs.record_of(sae, train)
    return Member("" if folder else name, sae, train, folder or run / "members" / name, record)


def train(
    data: Path, run: Path, members: Sequence[Member], mesh: jax.sharding.Mesh, cut: int | None = None
) -> list[int]:
    """Train to the end, or until `cut`; the steps whose batches were taken."""
    source = StoredRows(open_activations(data))
    sample = sampler(source, runs.SITES, runs.WIDTHS)
    # optax does not pass under strict promotion.
    with jax.numpy_dtype_promotion("standard"), source.open(runs.SITES, TRAIN.batch_size, 0, mesh) as batches:
        watched = Watched(batches, cut)
        end = loop.train(run, members, mesh, watched, sample).step
    assert end == max(member.train.steps for member in members)
    return watched.steps


def one_device() -> jax.sharding.Mesh:
    return meshes.make_mesh(meshes.MeshConfig(), jax.devices()[:1])


def bits_of(run: Path, member: Member) -> dict[str, bytes]:
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    with Checkpoints(run, writes=False) as saved:
        return runs.bits(saved.restore({"": abstract(member.sae, member.train, runs.WIDTHS, here)})[""])


class Whole(NamedTuple):
    """All five on one device, which nothing disturbed."""

    run: Path
    steps: list[int]  # of the batches that the loop took
    n_bytes: int  # that were read for them


@pytest.fixture(scope="module", autouse=True)
def _few_rows() -> Iterator[None]:
    """AuxK samples the rows of these small batches too."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(auxk, "LEAST_ROWS", 4)
        yield


@pytest.fixture(scope="module")
def whole(small_set: Path, tmp_path_factory: pytest.TempPathFactory) -> Whole:
    run, n_bytes = tmp_path_factory.mktemp("together") / "run", []
    read_chunk_into = ActivationSet.read_chunk_into

    def counted(self, name, chunk, rows):
        n_bytes.append(rows.nbytes)
        return read_chunk_into(self, name, chunk, rows)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(ActivationSet, "read_chunk_into", counted)
        steps = train(small_set, run, [member_of(run, name) for name in SETTINGS], one_device())
    return Whole(run, steps, sum(n_bytes))


@pytest.fixture(scope="module")
def together(whole: Whole) -> Path:
    return whole.run


def test_each_batch_is_read_once(whole: Whole, small_set: Path) -> None:
    """Whatever the number of members: two epochs are touched, a third may be read ahead."""
    assert max(row["dead_fraction"] for row in runs.rows_of(whole.run / "members" / "fast")) > 1 / 16  # AuxK samples
    assert whole.steps == list(range(TRAIN.steps))
    assert whole.n_bytes <= 3 * open_activations(small_set).n_rows * runs.D_MODEL * 4


@pytest.mark.parametrize("name", ["seeded", "wide"])
def test_a_member_is_its_solo_run(together: Path, small_set: Path, tmp_path: Path, name: str) -> None:
    """Bit for bit on the same mesh: log, state, and the same folder layout."""
    solo = member_of(tmp_path, name, tmp_path / "run")
    train(small_set, solo.folder, [solo], one_device())
    ours, theirs = together / "members" / name, solo.folder
    assert json.dumps(runs.rows_of(ours)) == json.dumps(runs.rows_of(theirs))
    assert bits_of(ours, solo) == bits_of(theirs, solo)
    assert {path.name for path in ours.iterdir()} == {path.name for path in theirs.iterdir()} - {"attempts.jsonl"}
    assert load(ours).record.steps == solo.train.steps
    assert load(ours).sae.config == solo.sae


def test_coefficients_are_data(small_set: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A sweep over them is one compilation, and each member its solo run. Without a penalty it is another program."""

    def penalised(name: str, coefficient: float, folder: Path) -> Member:
        plain, sae = member_of(tmp_path, "plain"), relu.Config(n_latents=64, l1_coefficient=coefficient)
        record = runs.record_of(sae, plain.train)
        return dataclasses.replace(plain, name=name, sae=sae, folder=folder, record=record)

    run = tmp_path / "run"
    weak, strong, none = (penalised(f"l{c}", c, run / "members" / f"l{c}") for c in (0.02, 0.5, 0.0))
    assert weak.program == strong.program != none.program
    steps = []
    with monkeypatch.context() as patched:
        patched.setattr("sae_jax.training.groups.Step", lambda *config: steps.append(Step(*config)) or steps[-1])
        train(small_set, run, [weak, strong], one_device())
    assert [step.compiled.n_programs for step in steps] == [1]
    solo = penalised("", 0.5, tmp_path / "solo")
    train(small_set, solo.folder, [solo], one_device())
    assert bits_of(strong.folder, solo) == bits_of(solo.folder, solo) != bits_of(weak.folder, solo)
    assert load(strong.folder).sae.config == strong.sae


def test_slices_exchange_metrics_alone() -> None:
    """And a state stays split where it enters and leaves a slice: no collective carries 64 rows of weights."""
    mesh = meshes.make_mesh(meshes.MeshConfig(member=4))
    rows = np.random.default_rng(0).normal(size=(32, runs.D_MODEL)).astype(np.float32)
    members = [member_of(Path(), name, batch_size=32) for name in FOUR]
    with jax.numpy_dtype_promotion("standard"), jax.set_mesh(mesh):
        states = initial_states(members, lambda norm: sample_statistics(rows, norm), mesh)
        (group,) = group_members(members, states, mesh)
        batch = place_rows({"acts": rows}, runs.SITES, mesh)
        text = group._step.trace(group._state, group._hparams, batch).lower().compile().as_text()
    collectives = hlo.collectives(text)
    assert not [shape for shape, _ in collectives if "64,8]" in shape]
    slices = [{0, 1}, {2, 3}, {4, 5}, {6, 7}]
    assert {shape for shape, groups in collectives if groups != slices} == {"f32[4]{0}"}
    assert len([shape for shape, groups in collectives if groups == slices]) > 5


@pytest.mark.long
@pytest.mark.parametrize(("member", "data", "resumed"), [(2, 2, 4), (4, 1, 2)])
def test_member_meshes(together: Path, small_set: Path, tmp_path: Path, member: int, data: int, resumed: int) -> None:
    """Cut off, then on another mesh: each member as on one device, to rounding."""
    run = tmp_path / "run"
    members = [member_of(run, name) for name in FOUR]
    with pytest.raises(KeyboardInterrupt):
        train(small_set, run, members, meshes.make_mesh(meshes.MeshConfig(data=data, member=member)), cut=12)
    assert runs.checkpoints(run)[-1] == 10
    assert load(run / "members" / "fast").record.steps == 10  # a member that is still in the set
    train(small_set, run, members, meshes.make_mesh(meshes.MeshConfig(member=resumed)))
    for name in FOUR:
        runs.assert_metrics_close(runs.rows_of(run / "members" / name), runs.rows_of(together / "members" / name))
    assert [(a["start_step"], a["mesh"]["member"]) for a in runs.attempts(run)] == [(0, member), (10, resumed)]


def test_a_set_is_refused_in_one_line(together: Path, small_set: Path, tmp_path: Path) -> None:
    """Other members, another shape of run, slices that stay idle; a set where a run is wanted."""
    run = tmp_path / "run"
    five = [member_of(together, name) for name in SETTINGS]
    alone = member_of(together, "plain", together)
    eight = [member_of(run, name) for name in SETTINGS]
    pairs = meshes.make_mesh(meshes.MeshConfig(member=2))
    for where, members, mesh, message in (
        (together, five[1:], one_device(), r"started with the member plain; keep the members to resume"),
        (together, [*five, dataclasses.replace(five[4], name="x")], one_device(), r"without the member x"),
        (together, [alone], one_device(), r"was started with the member alive"),
        (run, eight, pairs, r"mesh.member=2: .* wide; use mesh.member=1"),
    ):
        with pytest.raises(UsageError, match=message):
            train(small_set, where, members, mesh)
    assert not run.exists()
    with pytest.raises(UserError, match=r"a set of members; name one: .*members/plain, .*members/fast"):
        load(together)


@pytest.mark.long
def test_members_that_left_together_go_on_together(together: Path, small_set: Path, tmp_path: Path) -> None:
    """More steps after the end; not for one that ended earlier."""
    run = tmp_path / "run"

    def pair(plain: int, fast: int) -> list[Member]:
        return [member_of(run, "plain", steps=plain), member_of(run, "fast", steps=fast)]

    train(small_set, run, pair(8, 8), one_device())
    assert not (run / "checkpoints").exists()
    train(small_set, run, pair(20, 15), one_device())
    for name, steps in (("plain", 20), ("fast", 15)):
        assert runs.rows_of(run / "members" / name) == runs.rows_of(together / "members" / name)[:steps]
    with pytest.raises(UsageError, match=r"plain stands at step 20; train.steps=8 must be at least that"):
        train(small_set, run, pair(8, 15), one_device())
    with pytest.raises(UsageError, match=r"fast stands at step 15 and .*plain at 20, but members learn from the same"):
        train(small_set, run, pair(30, 30), one_device())


def test_the_end_of_a_set_may_be_cut_off(small_set: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed among the files that the members no longer need."""
    run, remove = tmp_path / "run", shutil.rmtree
    pair = [member_of(run, "plain", steps=8), member_of(run, "fast", steps=8)]

    def cut(path: Path, **kwargs) -> None:
        if path.parent == run and path.exists():
            for listed in path.rglob("digests-*"):
                listed.unlink()
            raise KeyboardInterrupt
        remove(path, **kwargs)

    with monkeypatch.context() as patched:
        patched.setattr(shutil, "rmtree", cut)
        with pytest.raises(KeyboardInterrupt):
            train(small_set, run, pair, one_device())
    train(small_set, run, pair, one_device())
    assert sorted(path.name for path in run.iterdir()) == ["attempts.jsonl", "config.json", "members"]


def test_a_member_that_fails_leaves_the_others_alone(together: Path, small_set: Path, tmp_path: Path) -> None:
    """What is left of it is what is needed to replay the step. Repeated, the command says so again."""
    run = tmp_path / "run"
    often = {"steps": 5, "checkpoint_every": 2}
    plain, wild, fast = (member_of(run, *own, **often) for own in (["plain"], ["seeded"], ["fast"]))
    wild = dataclasses.replace(wild, train=dataclasses.replace(wild.train, lr=1e18))
    for said in ("loss is .* at step 2; ", "see "):
        with pytest.raises(PartialError, match=rf"1 of 3 members failed: seeded: {said}.*failure-0.json") as caught:
            train(small_set, run, [plain, wild, fast], one_device())
        assert "\n" not in str(caught.value)
    for member in (plain, fast):
        assert runs.rows_of(member.folder) == runs.rows_of(together / "members" / member.name)[:5]
        assert load(member.folder).record.steps == 5
    assert [attempt["outcome"] for attempt in runs.attempts(run)] == ["failed"] * 2
    failure = json.loads((wild.folder / "failure-0.json").read_text())
    assert (failure["step"], len(failure["row_ids"])) == (2, TRAIN.batch_size)
    assert [row["step"] for row in runs.rows_of(wild.folder)] == [1]
    assert load(wild.folder).record.steps == failure["last_checkpoint"] == 1


@pytest.mark.long
def test_a_set_killed_at_any_moment(small_set: Path, tmp_path: Path) -> None:
    """Every member as in a set that nothing disturbed, bit for bit, also the one that had left before the kill."""
    runs_, rng = (tmp_path / "whole", tmp_path / "killed"), random.Random()
    listed = ("k4", "fast --train.lr=1e-2 --train.seed=3", "k8 --sae.k=8 --train.steps=20", "wild --train.lr=1e18")
    whole, killed = (
        runs.train_command(small_set, run, "--train.steps=60", "--train.checkpoint-every=10", "--members", *listed)
        for run in runs_
    )
    code, said = runs.finish(runs.start(whole))
    assert code == 3
    assert "sae-jax: 1 of 4 members failed: wild: loss is " in said
    for after in (12, 30):
        process = runs.start(killed)
        until = after + rng.randint(0, 15)
        runs.wait_for(lambda until=until: runs.step_of(runs_[1] / "members" / "k4") >= until, process)
        runs.kill(process)
        runs.finish(process)
    code, said = runs.finish(runs.start(killed))
    assert code == 3
    assert len(runs.attempts(runs_[1])) == 3
    for name in ("k4", "fast", "k8"):
        runs.assert_same_run(*(run / "members" / name for run in reversed(runs_)))
    assert runs.rows_of(runs_[1] / "members" / "wild") == runs.rows_of(runs_[0] / "members" / "wild")
