"""Whether what a classifier goes by can be taken away with a few latents.

SCR (spurious correlation removal)   a classifier learns a target from examples in which another label is always the
                                     same as it. The latents that tell that other label are ablated. Score:
                                     (accuracy ablated - accuracy before) / (accuracy of a classifier that learnt from
                                     balanced examples - accuracy before), on balanced examples; 1 repairs it
TPP (targeted probe perturbation)    a probe for each of several classes. The latents that tell one class are ablated.
                                     Score: how much accuracy that class's probe loses, less what the others lose on
                                     average

Classifiers are logistic probes of the activations at the reconstructed hook, mean over tokens. A latent is ablated by
subtracting its value times its decoder row; the dictionary's error stays. Latents are ranked by attribution: the
difference of their mean values between examples with and without a label, times the product of their decoder row and
the direction of that label's probe, on training examples. SCR takes the greatest absolute values, TPP the greatest ones
of latents that are stronger in the class. Latents without attribution are not ablated: there may be fewer than n.

Of two labels of the held-out text the target is the one that the classifier tells worse; files say which it is. SCR is
0 where the balanced classifier is not better by MIN_HEADROOM, and not cut off: it may exceed 1 or be negative.

Source: Karvonen et al. 2024, arXiv 2411.18895, and 2025 ("SAEBench", arXiv 2503.09532); Marks et al. 2024, arXiv
2403.19647, section 4, for the classifier.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from sae_jax.analysis.bootstrap import mean_and_interval
from sae_jax.evaluation import probes, study, tasks
from sae_jax.evaluation.base import Description, Metric, gathered
from sae_jax.evaluation.examples import SparseCode, mean_difference
from sae_jax.evaluation.probes import Probe
from sae_jax.evaluation.study import Case
from sae_jax.evaluation.tasks import Split, Task
from sae_jax.progress import Progress

NS = (5, 10, 20, 50, 100, 500)  # latents that are ablated
HEADLINE = 20
MIN_HEADROOM = 0.001  # of accuracy


@dataclass(frozen=True)
class Study(study.Study):
    """Ablates latents, and asks probes."""

    tasks: str = ""
    """a folder of .csv files with columns prompt and target, and spurious for SCR; or "": tasks from the held-out
    text"""
    n_sequences: int = 600
    """of held-out text"""
    n_train: int = 4000
    """examples of a task that probes are fitted to, at most"""
    n_test: int = 1000
    """others that they are judged by, at most"""

    SUITE = "probing"
    ORDER = 220
    VERSION = 2
    METRICS = {  # noqa: RUF012
        "scr": Description("SCR", f"share of a classifier's spurious errors that ablating {HEADLINE} latents repairs"),
        "scr_by_n": Description("SCR", "the same with so many ablated"),
        "tpp": Description("TPP", f"accuracy lost for a class, less that of others, when its {HEADLINE} are ablated"),
        "tpp_by_n": Description("TPP", "the same with so many ablated"),
        "spurious_by_task": Description("SCR and TPP by task", "the same of each task", in_table=False),
    }

    def metrics(self, case: Case) -> Iterator[Metric]:
        """See study.Study."""
        ns = tuple(n for n in NS if n <= case.subject.sae.b_enc.shape[0])
        kinds: tuple[tasks.Kind, ...] = ("crossed", "classes")
        n_tasks, made = tasks.tasks(case, self.tasks, kinds, self.n_sequences, self.n_train, self.n_test)
        w_dec_FY = np.asarray(case.subject.sae.w_dec)
        scores: dict[str, dict[str, np.ndarray]] = {"scr": {}, "tpp": {}}  # f64[., len(ns)] of each task
        with Progress("SCR and TPP", n_tasks, "tasks") as progress:
            for done, task in enumerate(made, 1):
                split = task.split(self.n_train, self.n_test, case.seed)
                pooled = task.examples.y, task.examples.code, w_dec_FY
                if task.kind == "crossed":
                    biased = _biased(task, self.n_train, case.seed)
                    target_N, spurious_N = task.label // 2 == 1, task.label % 2 == 1
                    if not self.tasks:
                        target_N, spurious_N = _worse_first(task, target_N, spurious_N, split.test, biased)
                    scores["scr"][task.name] = removal(*pooled, target_N, spurious_N, split, biased, ns)[None]
                else:
                    scores["tpp"][task.name] = perturbation(*pooled, split, len(task.classes), ns)
                progress.update(done)
        by_task: dict[str, dict[str, float]] = {}
        for name, of_tasks in scores.items():
            if of_tasks and ns:
                all_MN = np.concatenate([*of_tasks.values()])  # of pairs, or of classes
                by_n = {n: Metric(f"{n} latents", *mean_and_interval(all_MN[:, i])) for i, n in enumerate(ns)}
                if HEADLINE in by_n:
                    yield by_n[HEADLINE]._replace(name=name)
                yield gathered(f"{name}_by_n", by_n.values())
                for task, each_MN in of_tasks.items():
                    by_task[f"{name}: {task}"] = dict(zip(map(str, ns), each_MN.mean(0).tolist(), strict=True))
        if by_task:
            yield Metric("spurious_by_task", by_task)


def removal(
    y_NY: np.ndarray,
    code_NF: SparseCode,
    w_dec_FY: np.ndarray,
    target_N: np.ndarray,
    spurious_N: np.ndarray,
    split: Split,
    biased: np.ndarray,
    ns: Sequence[int],
) -> np.ndarray:
    """SCR for each number of latents, f64[len(ns)].

    Args:
        y_NY: activations.
        code_NF: codes of them.
        w_dec_FY: decoder rows.
        target_N: bool, what the classifier is to tell.
        spurious_N: bool, what it is not to go by.
        split: balanced examples of all four cells.
        biased: numbers of the training examples of which both labels are the same.
        ns: how many latents to ablate.
    """
    train, test = split.train, split.test
    classifier = probes.fit(y_NY[biased], target_N[biased])
    balanced, other = (probes.fit(y_NY[train], label_N[train]) for label_N in (target_N, spurious_N))
    before = classifier.accuracy(y_NY[test], target_N[test])
    headroom = balanced.accuracy(y_NY[test], target_N[test]) - before
    if headroom < MIN_HEADROOM:
        return np.zeros(len(ns))
    order = strongest(np.abs(attribution(code_NF[train], spurious_N[train], w_dec_FY, other)))
    logits = [ablated(classifier, y_NY[test], code_NF[test], w_dec_FY, order[:n]) for n in ns]
    return np.array([(probes.accuracy(logit_M, target_N[test]) - before) / headroom for logit_M in logits])


def perturbation(
    y_NY: np.ndarray,
    code_NF: SparseCode,
    w_dec_FY: np.ndarray,
    split: Split,
    n_classes: int,
    ns: Sequence[int],
) -> np.ndarray:
    """TPP of each class for each number of latents, f64[n_classes, len(ns)].

    The probe of a class tells it from equally many examples of all others together.
    """
    chosen = [_one_against_rest(split.train_label == c, split.test_label == c) for c in range(n_classes)]
    parts = [
        (split.train[i], split.train_label[i] == c, split.test[j], split.test_label[j] == c)
        for c, (i, j) in enumerate(chosen)
    ]
    fitted = [probes.fit(y_NY[train], label) for train, label, _, _ in parts]
    before_C = np.array([p.accuracy(y_NY[part[2]], part[3]) for p, part in zip(fitted, parts, strict=True)])
    scores_CN = np.zeros((n_classes, len(ns)))
    for c, (train, label, _, _) in enumerate(parts):
        order = strongest(attribution(code_NF[train], label, w_dec_FY, fitted[c], in_class=True))
        for i, n in enumerate(ns):
            after_C = np.array(
                [
                    probes.accuracy(ablated(p, y_NY[test], code_NF[test], w_dec_FY, order[:n]), test_label)
                    for p, (_, _, test, test_label) in zip(fitted, parts, strict=True)
                ]
            )
            lost_C = before_C - after_C
            scores_CN[c, i] = lost_C[c] - np.delete(lost_C, c).mean()
    return scores_CN


def attribution(
    code_NF: SparseCode, label_N: np.ndarray, w_dec_FY: np.ndarray, probe: Probe, in_class: bool = False
) -> np.ndarray:
    """What each latent adds to the difference of a probe's mean logits with and without a label, f64[F].

    `in_class`: 0 for latents that are weaker with the label.
    """
    return np.maximum(mean_difference(code_NF, label_N), 0 if in_class else -np.inf) * (
        w_dec_FY @ np.float32(probe.weight)
    )


def strongest(effect_F: np.ndarray) -> np.ndarray:
    """Latents with an effect, by number, the greatest effect first."""
    order = np.argsort(-effect_F, kind="stable")
    return order[effect_F[order] != 0]


def ablated(
    probe: Probe, y_NY: np.ndarray, code_NF: SparseCode, w_dec_FY: np.ndarray, latents: np.ndarray
) -> np.ndarray:
    """Logits of activations without what these latents put in, f64[N]."""
    return probe.logits(y_NY) - code_NF[:, latents] @ (w_dec_FY[latents] @ probe.weight)


def _biased(task: Task, n: int, seed: int) -> np.ndarray:
    """Training examples of which target and spurious label are the same, equally many of both."""
    label_N = np.select([task.label == 0, task.label == 3], [0, 1], -1)
    return Task(task.name, "binary", task.examples, label_N, task.is_test, ("neither", "both")).split(n, 0, seed).train


def _worse_first(
    task: Task, a_N: np.ndarray, b_N: np.ndarray, test: np.ndarray, biased: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Two labels, first the one that a classifier tells worse which learnt where they are the same."""
    classifier = probes.fit(task.examples.y[biased], a_N[biased])
    told_a, told_b = (classifier.accuracy(task.examples.y[test], each_N[test]) for each_N in (a_N, b_N))
    return (a_N, b_N) if told_a <= told_b else (b_N, a_N)


def _one_against_rest(*masks: np.ndarray) -> list[np.ndarray]:
    """Of each mask all that are true and as many others, spread over them."""
    chosen = []
    for is_class_N in masks:
        (inside,), (outside,) = np.nonzero(is_class_N), np.nonzero(~is_class_N)
        spread = outside[np.linspace(0, len(outside) - 1, min(len(inside), len(outside))).round().astype(int)]
        chosen.append(np.concatenate([inside, spread]))
    return chosen
