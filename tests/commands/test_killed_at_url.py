"""A command at s3:// that is killed before any of its requests and run again leaves what an undisturbed one leaves."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import sys
from collections.abc import Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest

from sae_jax.commands import collect, dashboard, evaluate, harvest, report, sweep, train  # noqa: F401  # for its forks
from sae_jax.commands import main as cli
from sae_jax.storage import Files
from sae_jax.storage.digests import SEAL
from sae_jax.training.logs import WALL_CLOCK
from tests import runs, s3
from tests.commands.test_at_url import HARVEST, TEXT, TRAIN, files
from tests.commands.test_sweep import RECIPE, write

pytestmark = [pytest.mark.slow, pytest.mark.long]

STRIDE = int(os.environ.get("KILL_STRIDE", "0"))  # kill at every so many requests; 0: at one of a command


def in_child(words: list[str], env: dict[str, str], said: Path) -> None:
    """`sae-jax words...` in a process that has everything imported."""
    os.environ.clear()
    os.environ.update(env)
    with said.open("w") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    sys.exit(cli.main(words))


class Folder:
    """A folder of the bucket in which commands are run, one after the other."""

    def __init__(self, door: s3.Door, root: str, here: Path) -> None:
        """`here`: an empty folder on the disk."""
        self.door, self.root, self.said = door, root, here / "said"
        self._forks = multiprocessing.get_context("forkserver")
        self._forks.set_forkserver_preload([__name__])
        self._env = {**runs.environment(optimised=False), **door.env}
        (here / "text.txt").write_text(TEXT)
        runs.write_set(here / "rows")
        recipe = write(here / "recipe.yaml", RECIPE)
        self.commands = {
            "harvest": ["--out", f"{root}/set", f"--harvest.text={here / 'text.txt'}", *HARVEST],
            "train": ["--data", f"{root}/set", "--out", f"{root}/run", *TRAIN],
            "evaluate": [f"{root}/run", "--tokens=256"],
            "collect": [f"{root}/run", "--out", f"{root}/store", "--tokens=512"],
            "dashboard": [f"{root}/run", "--out", f"{root}/site", "--tokens=512", "--store", f"{root}/store"],
            "report": [f"{root}/run"],
            "sweep": [str(recipe), "--data", str(here / "rows"), "--out", f"{root}/sweep"],
        }
        # By command: all files before it and after it, and how often it asks.
        self.before: dict[str, dict[str, bytes]] = {}
        self.left: dict[str, dict[str, bytes]] = {}
        self.n_requests: dict[str, int] = {}
        for name in self.commands:
            self.before[name] = files(root)
            first = len(door.requests)
            assert self.finish(self.start(name)) == self.code(name), self.said.read_text()
            self.n_requests[name] = len(door.requests) - first
            self.left[name] = files(root)

    def code(self, name: str) -> int:
        """Of the first budget of the sweep, which buys nothing: 3."""
        return 3 if name == "sweep" else 0

    def start(self, name: str) -> BaseProcess:
        """A command in a process of its own."""
        process = self._forks.Process(target=in_child, args=([name, *self.commands[name]], self._env, self.said))
        process.start()
        return process

    def finish(self, process: BaseProcess) -> int | None:
        """Its exit code, killing it if it does not end."""
        process.join(runs.SECONDS)
        if process.exitcode is None:
            process.kill()
            process.join()
        return process.exitcode

    def put_back(self, name: str) -> None:
        """All as it was before a command."""
        there, wanted = files(self.root), self.before[name]
        Files(self.root).delete_many([key for key in there if key not in wanted])
        for key, content in wanted.items():
            if there.get(key) != content:
                Files(self.root).write(key, content)


def without_clock(value: Any) -> Any:
    """A JSON value without how long something took, and without checksums, which are of that, too."""
    if isinstance(value, dict):
        return {key: without_clock(each) for key, each in value.items() if key not in (*WALL_CLOCK, SEAL)}
    return [without_clock(each) for each in value] if isinstance(value, list) else value


def readable(left: dict[str, bytes]) -> dict[str, Any]:
    """Files by name. Logs are joined, whatever segments they lie in; attempts, which count kills, are left out."""
    found: dict[str, Any] = {}
    for name in sorted(left):
        log, in_log, _ = name.partition(".jsonl")
        if in_log and not log.endswith("attempts"):
            found.setdefault(log, []).extend(without_clock(json.loads(line)) for line in left[name].splitlines())
        elif not in_log:
            found[name] = without_clock(json.loads(left[name])) if name.endswith(".json") else left[name]
    return found


def differing(folder: Folder, name: str) -> list[str]:
    """The files that are not those of a command that nobody disturbed."""
    found, expected = readable(files(folder.root)), readable(folder.left[name])
    return [key for key in sorted({*found, *expected}) if found.get(key) != expected.get(key)]


@pytest.fixture(scope="module")
def folder(s3_port: int, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Folder]:
    door = s3.Door(s3_port)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in door.env.items():
            patch.setenv(name, value)
        yield Folder(door, f"s3://{s3.BUCKET}/killed", tmp_path_factory.mktemp("killed"))
    door.close()


@pytest.mark.timeout(4 * 3600)
@pytest.mark.parametrize("name", ["harvest", "evaluate", "collect", "dashboard", "report", "sweep", "train"])
def test_killed_before_any_request(folder: Folder, name: str) -> None:
    n, failed = folder.n_requests[name], []
    for at in range(1, n + 1, STRIDE) if STRIDE else (n // 2,):
        folder.put_back(name)
        killed: list[BaseProcess] = []
        with folder.door.kills(at, lambda: killed[0]):
            killed.append(folder.start(name))
            code = folder.finish(killed[0])
        if code != -signal.SIGKILL:
            failed.append(f"{at}: ended with {code} before it asked so often")
            continue
        code = folder.finish(folder.start(name))
        said = folder.said.read_text()
        if code != folder.code(name) and "exists and is not empty" not in said:  # it had come to its end
            failed.append(f"{at}: then ends with {code}: {said[-500:]}")
            continue
        if wrong := differing(folder, name):
            failed.append(f"{at}: {wrong[:5]} differ")
    assert not failed, "\n".join(failed)


@pytest.mark.parametrize("name", ["harvest", "evaluate", "dashboard"])
def test_answers_that_are_slow_or_fail(folder: Folder, name: str) -> None:
    folder.put_back(name)
    folder.door.fails, folder.door.slow = 0.05, 0.1
    try:
        code = folder.finish(folder.start(name))
    finally:
        folder.door.fails, folder.door.slow = 0.0, 0.0
    assert code == 0, folder.said.read_text()
    assert differing(folder, name) == []
