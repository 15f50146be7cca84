"""How well one latent alone says what is true of a text.

probe_loss            for each task the cross-entropy of a logistic probe of one latent, on examples that neither probe
                      nor latent was fitted to or chosen by; mean over tasks
probe_loss_channels   the same of one dimension of the activations, probe_loss_pca of one principal component
probe_loss_base       of knowing how many examples are true, and no more: ln 2, as both classes are equally many

The probe sees the latent's pre-activation, for a passage or a text its mean over the tokens. It is x times the latent's
encoder row, but for a scale and a shift that a probe undoes: so it is of every variant, gated and JumpReLU ones too,
and what the variant then makes of it has no part in the number. Vectors are normalised as the variant does.

Source: Gao et al. 2024, arXiv 2406.04093, section 4.2, with tasks of ours: see ../tasks.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from sae_jax.analysis.bootstrap import mean_and_interval
from sae_jax.evaluation import probes, study, tasks
from sae_jax.evaluation.base import Description, Metric
from sae_jax.evaluation.examples import Examples
from sae_jax.evaluation.study import Case
from sae_jax.progress import Progress


@dataclass(frozen=True)
class Study(study.Study):
    """The best latent of each task."""

    tasks: str = ""
    """a folder of .csv files with columns prompt and target, sae-probes, or "": tasks from the held-out text"""
    n_sequences: int = 600
    """of held-out text"""
    n_train: int = 2000
    """examples of a task that probes are fitted to, at most"""
    n_test: int = 500
    """others that they are judged by, at most"""

    SUITE = "openai"
    ORDER = 110
    METRICS = {  # noqa: RUF012
        "probe_loss": Description("probe loss", "cross-entropy of the best latent of a task, nats, mean over tasks"),
        "probe_loss_channels": Description("probe loss, channels", "the same of the best dimension of the activations"),
        "probe_loss_pca": Description("probe loss, PCA", "the same of the best principal component"),
        "probe_loss_base": Description("probe loss, no latent", "the same of the base rate alone"),
        "probe_loss_by_task": Description("probe loss by task", "the same of each task", in_table=False),
    }

    def metrics(self, case: Case) -> Iterator[Metric]:
        """See study.Study."""
        n_tasks, made = tasks.tasks(case, self.tasks, ["binary"], self.n_sequences, self.n_train, self.n_test)
        by_task, components = {}, (None, np.zeros((0, 0)))
        with Progress("probe loss", n_tasks, "tasks") as progress:
            for done, task in enumerate(made, 1):
                if components[0] is not task.examples:
                    components = task.examples, _components(task.examples)
                train, y, test, y_test = task.split(self.n_train, self.n_test, case.seed)
                y, y_test = y == 1, y_test == 1
                x, normed = task.examples.x, task.examples.normed
                latents = probes.best_direction(normed[train], y, normed[test], y_test, case.subject.sae.w_enc)
                channels, pca = (
                    probes.best_direction(x[train], y, x[test], y_test, directions)
                    for directions in (np.eye(x.shape[1], dtype=np.float32), components[1])
                )
                by_task[task.name] = {
                    "probe_loss": latents.test_loss,
                    "latent": latents.index,
                    "probe_loss_channels": channels.test_loss,
                    "probe_loss_pca": pca.test_loss,
                    "probe_loss_base": probes.entropy(y_test),
                    "n_train": len(train),
                    "n_test": len(test),
                }
                progress.update(done)
        if by_task:
            for name in [*self.METRICS][:-1]:
                losses = np.array([each[name] for each in by_task.values()])
                yield Metric(name, *mean_and_interval(losses))
            yield Metric("probe_loss_by_task", by_task)


def _components(examples: Examples) -> np.ndarray:
    """Principal directions of the examples, f32[C, X]."""
    x_NX = np.float64(examples.x[examples.n_rows > 0])
    return np.linalg.eigh(np.cov(x_NX.T))[1].T.astype(np.float32)
