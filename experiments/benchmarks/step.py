"""How fast does a TopK autoencoder train on this machine's CPU or GPU, beside the trainers that people use?

Every trainer runs its own training loop (peers.py), takes the same batches from the same activation set in the same
order, and has the same width, k, batch and learning rate, Adam, neither EMA nor (in the fast settings, and ours)
clipping, and no dead latents. They take turns: in each round all of them train the same number of steps, one after the
other, so that a slow minute of the machine hits all. Steps are timed five together, and the first five of a turn, which
compile, allocate or fill caches, are left out. Peers get their batches from memory, as float32; ours is `sae-jax train`
itself, which reads, checks and shuffles the set on disk while it trains (a turn is a run resumed), timed by its own
log. In the end all reconstruct the same held-out rows.

    make bench-env && .venv-bench/bin/python experiments/benchmarks/step.py --out step.json      # about half an hour
    python experiments/benchmarks/step.py --smoke             # peers that are not installed are left out
    python experiments/benchmarks/step.py --checkout ../old   # another version of sae_jax takes turns with this one

Guess beforehand: the best peer (eai-sparsify, fused Adam, autocast) 0.62 s a step, ours as fast.

Answer: RESULTS.md.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import common
import numpy as np
import tyro

from sae_jax.training import logs

HERE = Path(__file__).parent
MODULES = {"eai-sparsify": "sparsify", "dictionary-learning": "dictionary_learning", "sae-lens": "sae_lens"}

WRITE_SET = """
import sys, numpy as np, sae_jax
sae_jax.write_activations(sys.argv[1], np.load(sys.argv[2], mmap_mode="r"))
"""
FVU = """
import sys, numpy as np, sae_jax
sae, x_BD = sae_jax.load(sys.argv[1]), np.load(sys.argv[2])
left_BD = x_BD - np.concatenate([np.asarray(sae(rows)) for rows in np.split(x_BD, max(len(x_BD) // 1024, 1))])
print(float((left_BD**2).sum() / ((x_BD - x_BD.mean(0)) ** 2).sum()))
"""


@dataclass(frozen=True)
class Benchmark:
    """Sizes of the benchmark."""

    d: int = 768
    n_latents: int = 32768
    k: int = 32
    batch_size: int = 2048
    lr: float = 1.4e-4  # of all: what ours and two of the others take by default at this width
    rows: int = 200_000
    heldout: int = 8192
    rounds: int = 5
    steps: int = 15  # of a turn
    only: tuple[str, ...] = ()  # settings of peers to run, such as "eai-sparsify: fast"; all if none is named
    checkout: Path | None = None  # of another version of sae_jax
    folder: Path | None = None  # where the set and our run are written; a temporary folder if not given
    out: Path | None = None  # JSON with every measurement
    smoke: bool = False  # small sizes, seconds


def main(config: Benchmark) -> None:
    if config.smoke:
        config = Benchmark(
            32, 512, 8, 256, 2e-3, 4096, 512, 2, 10, config.only, config.checkout, config.folder, config.out, True
        )
    with tempfile.TemporaryDirectory(dir=config.folder) as folder:
        work = Path(folder)
        rows = common.structured_rows(config.rows, config.d, seed=0)
        np.save(work / "rows.npy", np.concatenate([*rows]))
        np.save(work / "heldout.npy", np.concatenate([*common.structured_rows(config.heldout, config.d, seed=1)]))
        trainers: dict[str, Ours | Peer] = {"sae-jax": Ours(config, work, common.ROOT)}
        if config.checkout:
            trainers["sae-jax: checkout"] = Ours(config, work, config.checkout.absolute())
        for name, setting, options in _settings():
            if not config.only or f"{name}: {setting}" in config.only:
                trainers[f"{name}: {setting}"] = Peer(name, options, config, work)
        for turn in range(config.rounds):
            for name, trainer in list(trainers.items()):
                try:
                    trainer.train(config.steps)
                except RuntimeError as error:  # a setting that this peer cannot do; the others go on
                    print(f"{name}: {error}", file=sys.stderr)
                    del trainers[name]
                else:
                    print(f"round {turn + 1}: {name} {trainer.turns[-1]:.3f} s a step", file=sys.stderr)
        fvu = {name: trainer.fvu(work / "heldout.npy") for name, trainer in trainers.items()}
    results = {name: {"turns": trainer.turns, "fvu": fvu[name]} for name, trainer in trainers.items()}
    floor = _floor(config)
    title = (
        f"d={config.d}, n={config.n_latents}, k={config.k}, batch {config.batch_size}; FVU after "
        f"{config.rounds * config.steps * config.batch_size:,} tokens; {os.cpu_count()} cores"
    )
    ours = statistics.median(results["sae-jax"]["turns"])
    rows: list[list[Any]] = []
    for name, result in sorted(results.items(), key=lambda item: statistics.median(item[1]["turns"])):
        step = statistics.median(result["turns"])
        spread = f"{min(result['turns']):.3f} to {max(result['turns']):.3f}"
        rows.append(
            [name, f"{step:.3f}", spread, f"{config.batch_size / step:,.0f}", step / ours, f"{result['fvu']:.4f}"]
        )
    rows.append(["floor", f"{sum(floor.values()):.3f}", "", "", sum(floor.values()) / ours, ""])
    columns = ["trainer", "s/step, median of turns", "least to most", "tokens/s", "times ours", "FVU, held out"]
    common.report(
        common.table(title, columns, rows), {"config": asdict(config), "results": results, "floor": floor}, config.out
    )


class Ours:
    """`sae-jax train` of a checkout, resumed for each turn. Versions do not read each other's sets and runs."""

    def __init__(self, config: Benchmark, work: Path, checkout: Path) -> None:
        name = "" if checkout == common.ROOT else "checkout-"
        self._batch_size, self._run, self._done = config.batch_size, work / f"{name}run", 0
        self._environment = {**os.environ, "PYTHONPATH": _path(checkout)}
        self.turns: list[float] = []
        self._python(WRITE_SET, work / f"{name}set", work / "rows.npy")
        self._command = [
            *(sys.executable, "-m", "sae_jax.commands.main", "train"),
            *(f"--data={work / f'{name}set'}", f"--out={self._run}"),
            *(f"--sae.n-latents={config.n_latents}", f"--sae.k={config.k}", f"--train.batch-size={config.batch_size}"),
            *(f"--train.lr={config.lr}", "--train.clip=0", "--train.ema=0", f"--train.log-every={common.STEPS_TIMED}"),
            f"--train.checkpoint-every={10**9}",  # only at the end of a turn, after its last step is on record
            *["--train.decay=0"] * ("decay_share" in (checkout / "sae_jax/training/settings.py").read_text()),
        ]

    def train(self, steps: int) -> None:
        """A turn; raises RuntimeError if it fails."""
        words = [*self._command, f"--train.steps={self._done + steps}"]
        self._complete(words)
        rows = [row for row in logs.read_metrics(self._run) if row["step"] > self._done + common.STEPS_TIMED]
        self.turns.append(statistics.median(self._batch_size / row["tokens_per_second"] for row in rows))
        self._done += steps

    def fvu(self, heldout: Path) -> float:
        return float(self._python(FVU, self._run, heldout))

    def _python(self, code: str, *arguments: Path) -> str:
        return self._complete([sys.executable, "-c", code, *map(str, arguments)])

    def _complete(self, words: list[str]) -> str:
        done = subprocess.run(words, capture_output=True, text=True, env=self._environment)
        if done.returncode:
            raise RuntimeError(done.stderr)
        return done.stdout


class Peer:
    """Another library's trainer, in a process that waits between turns."""

    def __init__(self, name: str, options: str, config: Benchmark, work: Path) -> None:
        self.turns: list[float] = []
        self._log = work / f"{name} {options}.log"
        task = {"peer": name, "options": options, "data": str(work / "set"), **asdict(config)}
        self._process = subprocess.Popen(
            [sys.executable, "-c", "import sys, peers; peers.serve(sys.argv[1])", json.dumps(task, default=str)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log.open("w"),
            text=True,
            cwd=work,  # where what it leaves behind is deleted
            env={**os.environ, "PYTHONPATH": _path(HERE, common.ROOT), "OMP_NUM_THREADS": str(os.cpu_count())},
        )
        with contextlib.suppress(RuntimeError):  # `train` will say it
            self._ask(steps=0)  # it has started, and disturbs nobody's turn

    def train(self, steps: int) -> None:
        """A turn; raises RuntimeError if the process has ended."""
        self.turns.append(statistics.median(self._ask(steps=steps)["seconds"][1:]))

    def fvu(self, heldout: Path) -> float:
        answer = self._ask(fvu=str(heldout))["fvu"]
        self._process.stdin.close()
        self._process.wait()
        return answer

    def _ask(self, **order: Any) -> dict[str, Any]:
        try:
            self._process.stdin.write(json.dumps(order) + "\n")
            self._process.stdin.flush()
            return json.loads(self._process.stdout.readline())
        except (OSError, json.JSONDecodeError):
            lines = self._log.read_text().splitlines()
            raise RuntimeError(next((line for line in reversed(lines) if "Error" in line), lines[-1:])) from None


def _path(*folders: Path) -> str:
    return os.pathsep.join([*map(str, folders), *filter(None, [os.environ.get("PYTHONPATH")])])


def _settings() -> list[tuple[str, str, str]]:
    """(peer, setting, options) of the peers that are installed."""
    installed = [name for name, module in MODULES.items() if importlib.util.find_spec(module)]
    if not installed:
        return []
    import peers

    return [(name, setting, options) for name in installed for setting, options in peers.SETTINGS[name].items()]


def _floor(config: Benchmark) -> dict[str, float]:
    """Seconds that a step takes at least: one encoder product; weights, moments and gradients read and written once."""
    n, d = config.n_latents, config.d
    product = 2 * config.batch_size * n * d / common.matmul_rate(n, d)
    return {"encoder product": product, "optimiser": 2 * n * d * 4 * 8 / common.memory_rate()}


if __name__ == "__main__":
    main(tyro.cli(Benchmark))
