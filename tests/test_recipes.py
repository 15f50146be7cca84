"""Every recipe in configs/ parses and trains a step at a toy size; every experiment runs its --smoke."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from sae_jax import config, recipe
from sae_jax.commands.harvest import Harvest
from sae_jax.training.run import TrainJob
from tests import runs

ROOT = Path(__file__).parents[1]
RECIPES = sorted((ROOT / "configs").glob("*.yaml"))
EXPERIMENTS = sorted(path for path in (ROOT / "experiments").rglob("*.py") if "tyro.cli(" in path.read_text())


SAMPLE = ("absorption_tree",)  # that `make test` runs


def marks(path):
    """Experiments on one sweep go to one worker; those that are no sample have a target of their own."""
    return [pytest.mark.experiment] * (path.stem not in SAMPLE)


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_recipe_is_valid_and_tells_its_story(path):
    train = recipe.parse(TrainJob, [str(path), "--data=set", "--out=run"], "sae-jax train")
    harvest = recipe.parse(Harvest, [str(path), "--out=set"], "sae-jax harvest")
    harvested = "harvest" in config.read_yaml(path)  # else its set is made by `write_activations`
    assert set(train.site) <= set(harvest.harvest.hooks if harvested else ("acts",))
    assert path.read_text().startswith("#"), "its head says where it comes from and how to run it"


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_recipe_trains_at_a_toy_size(path, tmp_path):
    """Its own settings, on the bundled model's residual stream and eight latents of the width."""
    import jax
    import numpy as np

    from sae_jax.saes import base, init
    from sae_jax.training.settings import hyperparameters
    from sae_jax.training.state import initial
    from sae_jax.training.step import Step

    toy = ["--sae.n_latents=256", "--sae.k=4", "--train.batch_size=16", "--sae.dtype=float32"]
    command = recipe.parse(TrainJob, [str(path), "--data=set", "--out=run", *toy], "sae-jax train")
    rows = np.float32(np.random.default_rng(0).standard_normal((64, 8)))
    sample = init.sample_statistics(rows, command.sae.input_norm)
    with jax.numpy_dtype_promotion("standard"):
        state = jax.jit(lambda s: initial(command.sae, command.train, s))(sample)
        hparams = hyperparameters(command.train, command.sae)
        _, metrics = Step(command.sae, command.train)(state, hparams, base.Batch(rows[:16], rows[:16]))
    assert np.isfinite(float(metrics["loss"]))


@pytest.fixture(scope="module")
def smoke():
    """smoke(path, out, *flags): run the --smoke of an experiment into a folder, and return that."""
    shared: list[subprocess.Popen[str]] = []  # the process of those that need none of their own

    def run(path, out, *flags):
        starts_jax = "XLA_FLAGS" in path.read_text()
        process = shared.pop() if shared and not starts_jax else start()
        process.stdin.write(json.dumps([str(path), "--smoke", "--out", str(out), *map(str, flags)]) + "\n")
        process.stdin.flush()
        answer = process.stdout.readline()  # after a timeout the next one gets another process
        assert answer, f"{path.stem} took its process down"
        if starts_jax:
            end(process)
        else:
            shared.append(process)
        assert json.loads(answer) == ""
        return out

    def start():
        return subprocess.Popen(
            [sys.executable, ROOT / "tests" / "experiments_runner.py"],
            cwd=ROOT,
            env=runs.environment(optimised=False),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def end(process):
        process.stdin.close()
        process.wait()

    yield run
    for process in shared:
        end(process)


@pytest.fixture(scope="module")
def demo_set(tmp_path_factory):
    """A hundredth of the demo's set, for experiments that would make one."""
    data = tmp_path_factory.mktemp("demo") / "set"
    words = ("harvest", ROOT / "configs" / "demo.yaml", "--harvest.tokens=20480", "--out", data)
    code, said = runs.finish(runs.start(runs.command(*words)))
    assert code == 0, said
    return data


@pytest.fixture(scope="module")
def sweep(smoke, demo_set, tmp_path_factory):
    """The sweep of scaling_joint.py, from which other experiments take their points."""
    out = tmp_path_factory.mktemp("joint") / "out"
    return smoke(ROOT / "experiments" / "scaling_joint.py", out, "--data", demo_set) / "sweep"


@pytest.mark.slow
@pytest.mark.parametrize("path", [pytest.param(path, marks=marks(path)) for path in EXPERIMENTS], ids=lambda p: p.stem)
def test_experiment_runs(path, tmp_path, smoke, request):
    text = path.read_text()
    if path.stem == "kills" and shutil.which("gcc") is None:
        pytest.skip("needs gcc")
    if path.stem == "scaling_joint":
        assert (request.getfixturevalue("sweep") / "fit.json").exists()
    elif "sweep: Path | None" in text:
        smoke(path, tmp_path / "out", "--sweep", request.getfixturevalue("sweep"))
    elif "data: Path | None" in text and ("demo_recipe" in text or "laptop_recipe" in text):
        smoke(path, tmp_path / "out", "--data", request.getfixturevalue("demo_set"))
    else:
        smoke(path, tmp_path / "out")


def test_every_experiment_can_be_smoked():
    assert all("smoke: bool" in path.read_text() for path in EXPERIMENTS)
