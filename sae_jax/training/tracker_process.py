"""The process in which one tracker lives: messages come as JSON lines on stdin, what a person should read goes out.

A tracker may hang, take signals, hold a port or print, and when it ends it may wait for a network. None of this reaches
a run whose tracker is another process, which can be killed. When the run itself is killed, stdin ends, and what came
until then is brought to its end here. The file runs by its path and imports nothing of ours, so that it starts fast.

    {"do": "open", "member", "folder", "name", "group", "id", "is_new", "config", "start", "last", "past"}
    {"do": "row", "member", "row"}
    {"do": "density", "member", "step", "counts", "edges", "silent"}
    {"do": "end", "failed"}
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import signal
import struct
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

BLOCK, HEADER, RECORD = 32768, 7, 7  # bytes: of the blocks of wandb's files, of their header, of that of a record


class Wandb:
    """A run of Weights & Biases a member, which follows metrics.jsonl: each logged step is sent once."""

    def __init__(self) -> None:
        import wandb  # pyrefly: ignore[missing-import]

        self._wandb, self._runs, self._sent = wandb, {}, {}

    def open(self, message: dict[str, Any]) -> str:
        """Take up a member's run, and send what W&B lacks of the steps before. What a person should read."""
        folder, run_id = Path(message["folder"]), message["id"]
        # Console capture would take the progress line; code and git are in the record of the run.
        settings = self._wandb.Settings(console="off", silent=True, save_code=False, disable_git=True)
        run = self._wandb.init(
            project=os.environ.get("WANDB_PROJECT") or "sae_jax",
            group=os.environ.get("WANDB_RUN_GROUP") or message["group"],
            **{"name": message["name"], "id": run_id, "resume": "allow", "reinit": "create_new"},
            **{"dir": str(folder), "config": message["config"], "allow_val_change": True, "settings": settings},
        )
        self._runs[message["member"]] = run
        # What W&B has of an attempt that was killed may be less than was logged, and more than its last checkpoint.
        if run.offline:
            sent = 0 if message["is_new"] else _sent_offline(folder, run_id, otherwise=message["last"])
        else:
            sent = max(run.starting_step - 1, _sent_offline(folder, run_id, otherwise=0))
        self._sent[message["member"]] = sent
        for row in message["past"]:
            self.row({"member": message["member"], "row": row})
        return "" if run.offline or not run.url else run.url

    def row(self, message: dict[str, Any]) -> None:
        """The scalars of a logged step."""
        row = dict(message["row"])
        self._log(message["member"], row.pop("step"), row)

    def density(self, message: dict[str, Any]) -> None:
        """How many latents are how dense."""
        histogram = self._wandb.Histogram(np_histogram=(message["counts"], message["edges"]))
        self._log(message["member"], message["step"], {"log10_density": histogram, "silent": message["silent"]})

    def end(self, failed: bool) -> None:
        """Wait until everything has been sent, or is on the disk."""
        for run in self._runs.values():
            run.finish(exit_code=int(failed))

    def _log(self, member: str, step: int, values: dict[str, Any]) -> None:
        if step > self._sent[member]:
            self._runs[member].log(values, step=step)


class TensorBoard:
    """FOLDER/tensorboard of each member."""

    def __init__(self) -> None:
        from tensorboardX import SummaryWriter

        self._new, self._boards = SummaryWriter, {}

    def open(self, message: dict[str, Any]) -> str:
        """See Wandb. What an earlier attempt wrote after the step that this one begins at is taken back."""
        board = self._new(str(Path(message["folder"]) / "tensorboard"), purge_step=message["start"] + 1)
        board.add_text("config", f"```\n{json.dumps(message['config'], indent=2)}\n```", message["start"])
        self._boards[message["member"]] = board
        return ""

    def row(self, message: dict[str, Any]) -> None:
        """See Wandb."""
        row = dict(message["row"])
        step = row.pop("step")
        for name, value in row.items():
            self._boards[message["member"]].add_scalar(name, value, step)

    def density(self, message: dict[str, Any]) -> None:
        """See Wandb."""
        counts, edges = message["counts"], message["edges"]
        middles = [(low + high) / 2 for low, high in itertools.pairwise(edges)]
        sums = [sum(n * m**power for n, m in zip(counts, middles, strict=True)) for power in (1, 2)]
        board = self._boards[message["member"]]
        limits = {"min": edges[0], "max": edges[-1], "num": sum(counts), "sum": sums[0], "sum_squares": sums[1]}
        board.add_histogram_raw(
            "log10_density", **limits, bucket_limits=edges[1:], bucket_counts=counts, global_step=message["step"]
        )
        board.add_scalar("silent", message["silent"], message["step"])

    def end(self, failed: bool) -> None:
        """See Wandb."""
        for board in self._boards.values():
            board.close()


def _sent_offline(folder: Path, run_id: str, otherwise: int) -> int:
    """The last step in the files that earlier attempts left for `wandb sync`.

    What the process that writes them had not yet put there when it was killed with the run is lost, and is sent again.
    `otherwise`: where there is no such file, or its form is another than that of wandb 0.31.
    """
    files = [*folder.glob(f"wandb/offline-run-*-{run_id}/run-{run_id}.wandb")]
    try:
        steps = [step for path in files for step in history_steps(path.read_bytes())]
    except Exception:  # of whatever kind: a format that is not ours
        return otherwise
    return max(steps, default=0) if any(path.stat().st_size for path in files) else otherwise


def history_steps(data: bytes) -> Iterator[int]:
    """The steps of the history in a .wandb file, in order; a record that was cut off ends it.

    Its form is that of LevelDB's log: blocks of records with checksum, length and type, of which the middle of a long
    one (type 3) stands between its first (2) and last part (4).
    """
    from wandb.proto import wandb_internal_pb2  # pyrefly: ignore[missing-import]

    at, parts = HEADER, b""
    if data and data[:4] != b":W&B":
        raise ValueError("not a file of wandb")
    while at + RECORD <= len(data):
        if (left := BLOCK - at % BLOCK) < RECORD:
            at += left
            continue
        _, size, kind = struct.unpack_from("<IHB", data, at)
        if kind == 0:  # the rest of the block is empty
            at += left
            continue
        part = data[at + RECORD : at + RECORD + size]
        if len(part) < size:
            return
        at, parts = at + RECORD + size, part if kind in (1, 2) else parts + part
        if kind in (1, 4):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(parts)
            if record.WhichOneof("record_type") == "history":
                yield record.history.step.num


def main(kind: str) -> int:
    """Follow stdin to its end. 0, or 1 with the reason as the last line."""
    out = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what libraries print is no message of ours
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a cluster sends it to all processes of a job that is to save
    try:
        tracker = {"wandb": Wandb, "tensorboard": TensorBoard}[kind]()
        failed = True  # unless the run says otherwise
        for line in sys.stdin:
            message = json.loads(line)
            if message["do"] == "end":
                failed = message["failed"]
            elif said := getattr(tracker, message["do"])(message):
                out.write(f"{said}\n")
        tracker.end(failed)
    except BaseException as error:
        reason = (str(error).strip().splitlines() or [""])[0]
        with contextlib.suppress(OSError):
            out.write(f"{reason or type(error).__name__}\n")
        return 1
    return 0


if __name__ == "__main__":
    code = main(sys.argv[1])
    sys.stdout.flush()
    os._exit(code)  # what a library does at exit may wait for ever
