"""How well a few latents together say what is true of a text.

k-sparse probing     the k latents whose mean over the examples of one class differs most from that of the other, on the
                     training examples; a logistic probe of them; its accuracy and AUC on other examples
full probe           the same of all dimensions of the activations

Codes are means over the tokens of an example. Probes have an L2 penalty of weight 1 on scaled features, see
../probes.py, and see equally many examples of both classes.

Source: Gurnee et al. 2023, arXiv 2305.01610, as Karvonen et al. 2025 ("SAEBench", arXiv 2503.09532) use it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from sae_jax.analysis.bootstrap import mean_and_interval
from sae_jax.evaluation import probes, study, tasks
from sae_jax.evaluation.base import Description, Metric
from sae_jax.evaluation.examples import SparseCode, mean_difference
from sae_jax.evaluation.study import Case
from sae_jax.progress import Progress

KS = (1, 2, 5)
PROBES = (
    *(("sparse_probing", f"_{k}", f"{k} latent{'s' if k > 1 else ''}") for k in KS),
    ("full_probing", "", "activations"),
)


@dataclass(frozen=True)
class Study(study.Study):
    """A probe of few latents, for each task."""

    tasks: str = ""
    """a folder of .csv files with columns prompt and target, sae-probes, or "": tasks from the held-out text"""
    n_sequences: int = 600
    """of held-out text"""
    n_train: int = 4000
    """examples of a task that probes are fitted to, at most"""
    n_test: int = 1000
    """others that they are judged by, at most"""

    SUITE = "probing"
    ORDER = 210
    METRICS = {  # noqa: RUF012
        **{
            f"{name}_accuracy{k}": Description(f"accuracy, {what}", "of a probe, chosen for each task; mean over tasks")
            for name, k, what in PROBES
        },
        **{f"{name}_auc{k}": Description(f"AUC, {what}", "area under its ROC curve") for name, k, what in PROBES},
        "sparse_probing_by_task": Description("sparse probing by task", "the same of each task", in_table=False),
    }

    def metrics(self, case: Case) -> Iterator[Metric]:
        """See study.Study."""
        n_tasks, made = tasks.tasks(case, self.tasks, ["binary"], self.n_sequences, self.n_train, self.n_test)
        by_task = {}
        with Progress("sparse probing", n_tasks, "tasks") as progress:
            for done, task in enumerate(made, 1):
                train, y, test, y_test = task.split(self.n_train, self.n_test, case.seed)
                y, y_test = y == 1, y_test == 1
                order = ranked(task.examples.code[train], y)
                scores: dict[str, float] = {}
                code_NK = task.examples.code[:, order[: max(KS)]].toarray()  # of latents that are ranked, in order
                for (name, k, _), x in zip(PROBES, [*(code_NK[:, :k] for k in KS), task.examples.x], strict=True):
                    logit = probes.fit(x[train], y).logits(x[test])
                    scores[f"{name}_accuracy{k}"] = probes.accuracy(logit, y_test)
                    scores[f"{name}_auc{k}"] = probes.auc(logit, y_test)
                by_task[task.name] = {**scores, "latents": order[: max(KS)].tolist(), "n_train": len(train)}
                progress.update(done)
        if by_task:
            for name in [*self.METRICS][:-1]:
                values = np.array([each[name] for each in by_task.values()])
                yield Metric(name, *mean_and_interval(values))
            yield Metric("sparse_probing_by_task", by_task)


def ranked(code_NF: SparseCode, y_N: np.ndarray) -> np.ndarray:
    """Latents by how much their means differ between the classes, i64[F], the greatest difference first."""
    return np.argsort(-np.abs(mean_difference(code_NF, y_N)), kind="stable")
