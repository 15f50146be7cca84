"""The files of launch/: read by checkers of the programs that they are for, and started with stand-ins for these."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from sae_jax.commands.usage import COMMANDS
from tests import runs

LAUNCH = runs.ROOT / "launch"
SCRIPTS = sorted([*LAUNCH.glob("*.sh"), *LAUNCH.glob("*.sbatch")])
POD_FILES = sorted((LAUNCH / "gke").glob("*.yaml"))
SKY_FILES = sorted((LAUNCH / "sky").glob("*.yaml"))


def tool(name: str) -> str:
    """Where a checker is; the test is skipped where it is not (conftest.py)."""
    found = shutil.which(name, path=os.pathsep.join(filter(None, (os.environ.get("LAUNCH_TOOLS"), os.environ["PATH"]))))
    if found is None or (name == "python" and "LAUNCH_TOOLS" not in os.environ):
        pytest.skip(f"{name} of `make test-launch` is not here")
    return found


def run(*words: str | Path, **env: str) -> str:
    """What a command that must succeed says."""
    done = subprocess.run([*map(str, words)], env={**os.environ, **env}, capture_output=True, text=True, cwd=runs.ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_the_readme_lists_every_file() -> None:
    table = (LAUNCH / "README.md").read_text()
    files = [path.relative_to(LAUNCH).as_posix() for path in LAUNCH.rglob("*") if path.is_file()]
    assert [name for name in files if name != "README.md" and f"launch/{name}" not in table] == []


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_bash_reads_it(path: Path) -> None:
    run("bash", "-n", path)


def test_shellcheck_finds_nothing() -> None:
    run(tool("shellcheck"), *SCRIPTS)


@pytest.mark.parametrize("path", SKY_FILES, ids=lambda path: path.name)
def test_shellcheck_finds_nothing_in_what_skypilot_runs(path: Path, tmp_path: Path) -> None:
    content = yaml.safe_load(path.read_text())
    for part in ("setup", "run"):
        script = tmp_path / f"{part}.sh"
        script.write_text(f"#!/bin/bash\n{content[part]}")
        run(tool("shellcheck"), "--exclude=SC2086", script)  # $ARGS are words


def test_hadolint_finds_nothing() -> None:
    run(tool("hadolint"), LAUNCH / "Dockerfile")


def test_the_image_has_what_it_copies() -> None:
    lines = (LAUNCH / "Dockerfile").read_text()
    (constraints,) = re.findall(r"--constraint (\S+)", lines)
    assert (runs.ROOT / constraints).exists()
    (extras,) = re.findall(r'"\.\[(.*)\]"', lines)
    project = (runs.ROOT / "pyproject.toml").read_text()
    assert all(re.search(rf"^{name} = ", project, re.M) for name in ("tpu", "cuda13", extras.split(",")[-1]))


def test_kubernetes_reads_the_workers() -> None:
    run(tool("kubernetes-validate"), "--strict", LAUNCH / "gke/workers.yaml")


def test_kubernetes_reads_the_jobsets() -> None:
    run(tool("python"), runs.ROOT / "tests/launch/read_jobset.py", *LAUNCH.glob("gke/train_*.yaml"))


def test_what_stands_in_a_jobset_twice_agrees() -> None:
    for path in LAUNCH.glob("gke/train_*.yaml"):
        content = yaml.safe_load(path.read_text())
        (job,) = content["spec"]["replicatedJobs"]
        spec = job["template"]["spec"]
        (container,) = spec["template"]["spec"]["containers"]
        env = {each["name"]: each.get("value") for each in container["env"]}
        assert spec["parallelism"] == spec["completions"]
        assert int(env.get("JAX_NUM_PROCESSES", spec["completions"])) == spec["completions"]
        first = f"{content['metadata']['name']}-{job['name']}-0-0.{content['metadata']['name']}:8476"
        assert env.get("JAX_COORDINATOR_ADDRESS", first) == first
        assert spec["template"]["spec"]["terminationGracePeriodSeconds"] >= 120


@pytest.mark.parametrize("path", SKY_FILES, ids=lambda path: path.name)
def test_skypilot_reads_it(path: Path, tmp_path: Path) -> None:
    code = "import sys, sky; task = sky.Task.from_yaml(sys.argv[1]); print(task.num_nodes, *task.resources)"
    assert "Spot" in run(tool("python"), "-c", code, path, HOME=str(tmp_path))


@pytest.mark.parametrize("path", [*POD_FILES, *SKY_FILES, *SCRIPTS], ids=lambda path: path.name)
def test_commands_and_flags_in_it_exist(path: Path) -> None:
    named = set(re.findall(r"`?sae-jax ([a-z]+)", path.read_text()))
    assert named <= set(COMMANDS)


FAKE_GCLOUD = """#!/bin/bash
# state: lines, one a question; the last stays. codes: of the commands on the hosts, in turn.
echo "$*" >>calls
next() { head -n 1 "$1"; if (($(wc -l <"$1") > 1)); then sed -i 1d "$1"; fi; }
case "$*" in
*describe*) next state ;;
*'cat sae.code'*) cat code ;;
*bin/sae-jax*) next codes >code; [[ $(<code) == 0 ]] || exit 1 ;;
esac
"""


def tpu_vm(folder: Path, states: list[str], codes: list[int], *words: str) -> tuple[int, list[str], str]:
    """launch/tpu_vm.sh with a gcloud that answers so: exit code, calls, what was said."""
    (folder / "gcloud").write_text(FAKE_GCLOUD)
    (folder / "gcloud").chmod(0o755)
    (folder / "calls").write_text("")
    (folder / "state").write_text("\n".join(states) + "\n")
    (folder / "codes").write_text("\n".join(map(str, codes)) + "\n")
    env = {"TPU": "sae", "ZONE": "z", "TYPE": "v5p-32", "VERSION": "v", "SPOT": "1", "SECONDS_BETWEEN_LOOKS": "0.01"}
    done = subprocess.run(
        [LAUNCH / "tpu_vm.sh", *words],
        env={**os.environ, **env, "PATH": f"{folder}:{os.environ['PATH']}"},
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=60,
    )
    return done.returncode, (folder / "calls").read_text().splitlines(), done.stdout + done.stderr


def test_a_slice_is_made_waited_for_and_used_by_all_hosts(tmp_path: Path) -> None:
    code, calls, said = tpu_vm(tmp_path, ["WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE"], [0], "create")
    assert code == 0, said
    assert calls[0].startswith("compute tpus queued-resources create sae --node-id=sae --accelerator-type=v5p-32")
    assert "--spot --zone z" in calls[0]
    assert sum("describe" in call for call in calls) == 3

    code, calls, said = tpu_vm(tmp_path, ["ACTIVE"], [0], "run", "train", "recipe.yaml", "--members", "a --sae.k=2")
    assert code == 0, said
    assert "tpu-vm ssh sae --worker=all" in calls[0]
    assert r"sae-jax train recipe.yaml --members a\ --sae.k=2" in calls[0], "words stay words"

    code, calls, said = tpu_vm(tmp_path, ["FAILED"], [0], "create")
    assert (code, "sae is FAILED" in said) == (1, True)


def test_a_slice_that_is_taken_away_is_made_again(tmp_path: Path) -> None:
    states = ["ACTIVE", *["SUSPENDED"] * 4, "CREATING", "ACTIVE"]
    code, calls, said = tpu_vm(tmp_path, states, [75, 0], "keep", "train", "recipe.yaml")
    assert code == 0, said
    what = [word for call in calls for word in ("create", "delete", "scp", "bin/sae-jax") if word in call]
    assert what == ["bin/sae-jax", "delete", "create", "scp", "bin/sae-jax"]


def test_a_stop_that_leaves_the_slice_is_resumed_there_and_a_failure_is_not(tmp_path: Path) -> None:
    code, calls, said = tpu_vm(tmp_path, ["ACTIVE"], [75, 0], "keep", "train", "recipe.yaml")
    assert (code, sum("bin/sae-jax" in call for call in calls)) == (0, 2), said
    code, calls, said = tpu_vm(tmp_path, ["ACTIVE"], [2], "keep", "train", "recipe.yaml")
    assert (code, sum("bin/sae-jax" in call for call in calls)) == (1, 1), said
    assert not any("delete" in call for call in calls)
