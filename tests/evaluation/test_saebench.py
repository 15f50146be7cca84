"""The numbers of SAEBench 0.6.0 (Karvonen et al. 2025, arXiv 2503.09532), on the same dictionary and data.

SAEBench pins other versions of numpy and datasets, so its code runs in an environment of its own, whose Python the
variable SAEBENCH_PYTHON names; `make test-saebench` makes it, and prints the table of docs/metrics.md. Where formulas
differ, ours is computed once more by SAEBench's rule and has to agree then: what remains is the rule.
"""

import os
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sae_jax
from sae_jax import lm
from sae_jax.activations.forward import read_hooks
from sae_jax.evaluation import evaluate, examples, probes, tasks
from sae_jax.evaluation.batches import Candidate
from sae_jax.evaluation.studies import absorption, duplicates, sparse_probing, spurious
from sae_jax.evaluation.text import HeldOut, open_set

PYTHON = os.environ.get("SAEBENCH_PYTHON")
pytestmark = [
    pytest.mark.peers,
    pytest.mark.skipif(not PYTHON, reason="SAEBENCH_PYTHON names no Python with sae-bench"),
    pytest.mark.timeout(1800),
    pytest.mark.usefixtures("one_device"),
]

N_TOKENS, BATCH = 128 * 128, 32  # of the core numbers; sequences of a batch of SAEBench
N_SEQUENCES, PASSAGE = 600, 32  # for probes
TASKS = ("passage has a digit", "passage has a quotation mark", "passage has many characters")
NS = (2, 5, 20)
N_TRAIN, N_TEST = 500, 200


class Row(NamedTuple):
    """A line of the table."""

    name: str
    ours: float
    theirs: float
    by_their_rule: float | None = None  # ours, where the rules differ
    tolerance: float = 1e-3

    @property
    def difference(self) -> float:
        return abs((self.ours if self.by_their_rule is None else self.by_their_rule) - self.theirs)


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A TopK dictionary of the bundled model."""
    folder = tmp_path_factory.mktemp("saebench")
    sae_jax.harvest(folder / "set", text="stdlib", heldout="heldout", tokens=300_000)
    settings = {"n_latents": 2048, "k": 16, "steps": 400, "batch_size": 2048, "dtype": "float32"}
    sae_jax.train(folder / "set", out=folder / "run", **settings)
    return folder / "run"


@pytest.fixture(scope="module")
def both(run: Path):
    """(what was measured here, SAEBench's numbers, the data that both had)."""
    d = sae_jax.load(run)
    candidate = Candidate.of(d, open_set(d.record))
    measured = evaluate.evaluate({"": candidate}, evaluate.Settings(N_TOKENS))[""]
    wide = evaluate.evaluate({"": candidate}, evaluate.Settings(N_SEQUENCES * 128))[""]
    folder = run.parent / "exchange"
    folder.mkdir()
    sae_jax.export(run, "saelens", folder / "sae")
    shutil.copytree(lm.model.BUNDLED, folder / "model")
    data, ours = probing(wide.case)
    text = measured.case.text
    data |= {"ids": text.sequences, "special": np.array(sorted(text.tokenizer.special_ids))}
    np.savez(folder / "data.npz", **data)
    script = Path(__file__).parent / "in_saebench.py"
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"HF_HUB_OFFLINE": "1"}
    done = subprocess.run([PYTHON, script, folder], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return measured, ours, dict(np.load(folder / "theirs.npz"))


def probing(case):
    """(what SAEBench is handed, our scores on it)."""
    text, sae = case.text, case.subject.sae
    hook = case.subject.encoded[0]
    w_dec = np.asarray(sae.w_dec)
    acts_STD = np.concatenate(
        [np.asarray(read_hooks(text.model, ids, (hook,), "float32")[0][str(hook)]) for ids in blocks(text.sequences)]
    )
    n, width = text.sequences.shape
    passages = width // PASSAGE
    whole_P = text.text.reshape(-1, PASSAGE).all(1)  # their means would count what is no text
    part_ST = np.where(whole_P, np.arange(n * passages), -1).repeat(PASSAGE).reshape(n, width)
    (made,) = examples.of_sequences(case, text.sequences, text.text, [part_ST], "")
    made = replace(made, n_rows=np.where(whole_P, made.n_rows, 0))
    acts_PLD = acts_STD.reshape(n * passages, PASSAGE, -1)
    numbers, inverse = np.unique(text.sequences, return_inverse=True)
    strings = case.subject.tokenizer.tokens(numbers)
    labels = tasks.TextProperties(strings, inverse.reshape(n, width), text.text).of_passages(passages, PASSAGE)
    is_test = np.arange(n).repeat(passages) % 5 == 4
    data, ours = {"tasks": np.array(TASKS), "ns": np.array(NS)}, {}

    for name in TASKS:
        task = tasks.Task(name, "binary", made, labels[name].ravel(), is_test, ("no", "yes"))
        train, y, test, y_test = task.split(N_TRAIN, N_TEST, 0)
        order = sparse_probing.ranked(made.code[train], y == 1)
        for k in sparse_probing.KS:
            code_Nk = made.code[:, order[:k]].toarray()
            probe = probes.fit(code_Nk[train], y == 1)
            ours[f"{name}/latents_{k}"] = np.sort(order[:k])
            ours[f"{name}/accuracy_{k}"] = probe.accuracy(code_Nk[test], y_test == 1)
        data |= {f"{name}/train": acts_PLD[train], f"{name}/train_label": y == 1}
        data |= {f"{name}/test": acts_PLD[test], f"{name}/test_label": y_test == 1}

    first, second = "passage has a capital letter", "passage has many characters"
    crossed = tasks._crossed(labels[first].ravel(), labels[second].ravel())
    task = tasks.Task("scr", "crossed", made, crossed, is_test, tasks.CELLS)
    split, biased = task.split(N_TRAIN, N_TEST, 0), spurious._biased(task, N_TRAIN, 0)
    target_N, spurious_N = crossed // 2 == 1, crossed % 2 == 1
    target_N, spurious_N = spurious._worse_first(task, target_N, spurious_N, split.test, biased)
    ours["scr"] = spurious.removal(made.y, made.code, w_dec, target_N, spurious_N, split, biased, NS)
    for name, rows, label in (
        ("classifier", biased, target_N),
        ("target", split.train, target_N),
        ("spurious", split.train, spurious_N),
    ):
        probe = probes.fit(made.y[rows], label[rows])
        data |= {f"scr/{name}_weight": probe.weight, f"scr/{name}_bias": probe.bias}
    for part, rows in (("train", split.train), ("test", split.test)):
        data |= {f"scr/{part}": acts_PLD[rows], f"scr/{part}_target": target_N[rows]}
        data |= {f"scr/{part}_spurious": spurious_N[rows]}

    (task,) = tasks.of_text(case, ["classes"], N_SEQUENCES)
    split, n_classes = task.split(3 * N_TRAIN, 3 * N_TEST, 0), len(task.classes)
    ours["tpp"] = spurious.perturbation(task.examples.y, task.examples.code, w_dec, split, n_classes, NS).mean(0)
    data["tpp/n_classes"], fitted = n_classes, []
    for part, rows, label in (("train", split.train, split.train_label), ("test", split.test, split.test_label)):
        data |= {f"tpp/{part}": task.examples.y[rows][:, None], f"tpp/{part}_label": label}
        place = np.argsort(np.argsort(label, kind="stable"), kind="stable")  # once classes follow each other
        for c, (chosen,) in enumerate([spurious._one_against_rest(label == c) for c in range(n_classes)]):
            data |= {f"tpp/{part}_chosen_{c}": place[chosen], f"tpp/{part}_is_class_{c}": label[chosen] == c}
            if part == "train":
                fitted.append(probes.fit(task.examples.y[rows][chosen], label[chosen] == c))
    data["tpp/weight"], data["tpp/bias"] = np.stack([p.weight for p in fitted]), np.array([p.bias for p in fitted])

    study = absorption.Study(n_sequences=N_SEQUENCES)
    word_N, made = study._words(case)
    letter_N, is_test_N = np.array([word[0] for word in word_N]), np.isin(word_N, absorption._test_words(word_N))
    own_NY, letters = made.y - absorption._without_latents(case, made), []
    for letter in np.unique(letter_N):
        y_N = letter_N == letter
        if not absorption._has_words(word_N[y_N], is_test_N[y_N]):
            continue
        letters.append(letter)
        probe = probes.fit(made.y[~is_test_N], y_N[~is_test_N], balanced=True)
        main, _ = study.main_latents(made.code, y_N, is_test_N)
        for name, rows_NY in (("", own_NY), ("_raw", np.asarray(made.y))):
            found = study.absorbed(made.code[y_N], rows_NY[y_N], w_dec, probe.weight, main)
            ours |= {f"absorption/{letter}_share{name}": found.share, f"absorption/{letter}_full{name}": found.full}
        data |= {f"absorption/{letter}_acts": made.y[y_N], f"absorption/{letter}_main": main}
        data[f"absorption/{letter}_direction"] = probe.weight
    data["absorption/letters"] = ours["absorption/letters"] = np.array(letters)
    (ours["duplicates"],) = [metric.value for metric in duplicates.Study().metrics(case)]
    return data, ours


def blocks(ids_ST):
    return np.split(ids_ST, range(BATCH, len(ids_ST), BATCH))


def by_their_rules(text: HeldOut, sae) -> dict[str, float]:
    """Ours, by SAEBench's formulas and masks, in float64.

    Predictions from a special token do not count, those of one do. All positions of the KL count, the last one of a
    sequence too. Zeros stand at special tokens as well.
    """
    hook, sums = text.encoded[0], {name: [] for name in ("ce", "ce_sae", "ce_zero", "kl", "square", "error", "ratio")}
    for ids_ST, keep_ST in zip(blocks(text.sequences), blocks(text.text), strict=True):
        x_STD = lm.run(text.model, jnp.asarray(ids_ST), capture=(hook,)).acts[hook]
        hat_STD = sae(x_STD.reshape(-1, x_STD.shape[-1])).reshape(x_STD.shape)
        versions = {"": x_STD, "_sae": jnp.where(keep_ST[..., None], hat_STD, x_STD), "_zero": jnp.zeros_like(x_STD)}
        log_p = {}
        for name, rows in versions.items():
            logits = lm.run(text.model, jnp.asarray(ids_ST), edits={hook: lambda _, rows=rows: rows}).logits
            log_p[name] = np.asarray(jax.nn.log_softmax(logits), np.float64)
            taken = -np.take_along_axis(log_p[name][:, :-1], ids_ST[:, 1:, None], -1)[..., 0]
            sums[f"ce{name}"].append(taken[keep_ST[:, :-1]])
        sums["kl"].append((np.exp(log_p[""]) * (log_p[""] - log_p["_sae"])).sum(-1)[keep_ST])
        x_ND, hat_ND = (np.asarray(each, np.float64)[keep_ST] for each in (x_STD, hat_STD))
        sums["square"].append((x_ND**2).sum(1))
        sums["error"].append(((x_ND - hat_ND) ** 2).sum(1))
        sums["ratio"].append(sums["error"][-1] / ((x_ND - x_ND.mean(0)) ** 2).sum(1))
    parts = {name: np.concatenate(each) for name, each in sums.items()}
    mean = {name: float(each.mean()) for name, each in parts.items()}
    width = sae.w_dec.shape[1]
    of_batch = [each / len(each) for each in sums["error"]]
    return {
        **mean,
        "score": (mean["ce_zero"] - mean["ce_sae"]) / (mean["ce_zero"] - mean["ce"]),
        # The mean over dimensions of E x_d^2, squared, in the place of |E x|^2.
        "explained": 1 - mean["error"] / (mean["square"] - (mean["square"] / width) ** 2),
        "legacy": 1 - mean["ratio"],  # a mean of ratios
        "mse": float(np.concatenate(of_batch).mean()),  # divided by the tokens of the batch once too often
    }


def table(measured, ours, theirs) -> list[Row]:
    """Everything that both say."""
    case, found = measured.case, measured.to_json()
    rules = by_their_rules(case.text, case.subject.sae)
    core = {name.removeprefix("core/"): value for name, value in theirs.items() if name.startswith("core/")}
    sums = measured.sums["reconstruction"]
    n = measured.sums[""]["rows"]
    density_F = measured.sums["sparsity"]["active_F"] / n
    rows = [
        Row("L0", found["l0"], core["l0"]),
        Row("cosine", found["cosine"], core["cossim"]),
        Row("gamma, relative reconstruction bias", found["gamma"], core["relative_reconstruction_bias"]),
        Row("density, largest difference of a latent", 0.0, np.abs(density_F - core["feature_density"]).max()),
        Row("silent latents", found["silent_fraction"], (core["feature_density"] == 0).mean()),
        Row("duplicates", ours["duplicates"], (core["max_decoder_cosine_sim"] > 0.9).mean()),
        Row("1 - FVU, explained variance", 1 - found["fvu"], core["explained_variance"], rules["explained"]),
        Row("1 - FVU, its older formula", 1 - found["fvu"], core["explained_variance_legacy"], rules["legacy"]),
        Row("squared error a row, MSE", sums["error2_Y"].sum() / n, core["mse"], rules["mse"]),
        Row("CE", found["ce_clean"], core["ce_loss_without_sae"], rules["ce"]),
        Row("CE, reconstruction", found["ce_sae"], core["ce_loss_with_sae"], rules["ce_sae"]),
        Row("CE, zeros", found["ce_zero"], core["ce_loss_with_ablation"], rules["ce_zero"]),
        Row("loss recovered from zeros, CE score", found["loss_recovered_zero"], core["ce_loss_score"], rules["score"]),
        Row("KL", found["kl"], core["kl_div_with_sae"], rules["kl"]),
    ]
    for k in sparse_probing.KS:
        mine, unscaled, scaled = (
            float(np.mean([source[f"{task}/{name}_{k}"] for task in TASKS]))
            for source, name in ((ours, "accuracy"), (theirs, "accuracy"), (theirs, "accuracy_scaled"))
        )
        # Probes that are fitted until 1e-4 and 1e-9 may tell one example apart, of about 200 a task.
        rows.append(Row(f"accuracy of {k} latents", mine, unscaled, mine + unscaled - scaled, 2e-3))
    for i, n_ablated in enumerate(NS):
        rows.append(Row(f"SCR, {n_ablated} latents", ours["scr"][i], theirs["scr"][i]))
        rows.append(Row(f"TPP, {n_ablated} latents", ours["tpp"][i], theirs["tpp"][i]))
    for name, label in (("share", "absorption"), ("full", "full absorption")):
        mean = []
        for source, kind in ((ours, ""), (theirs, ""), (ours, "_raw")):
            of_letters = [source[f"absorption/{letter}_{name}{kind}"].mean() for letter in ours["absorption/letters"]]
            mean.append(float(np.mean(of_letters)))
        rows.append(Row(label, *mean))
    return rows


def test_numbers_agree_where_rules_do(both):
    rows = table(*both)
    print(f"\n{'metric':42}{'ours':>10}{'SAEBench':>10}{'difference':>12}{'by its rule':>13}")
    for name, ours, theirs, rule, _ in rows:
        shown = "" if rule is None else f"{rule:.4f}"
        print(f"{name:42}{ours:10.4f}{theirs:10.4f}{theirs - ours:12.4f}{shown:>13}")
    wrong = [row for row in rows if not row.difference < row.tolerance]
    assert not wrong


def test_the_same_latents_are_probed(both):
    _, ours, theirs = both
    for task in TASKS:
        for k in sparse_probing.KS:
            np.testing.assert_array_equal(theirs[f"{task}/latents_{k}"], ours[f"{task}/latents_{k}"])


def test_every_word_is_absorbed_alike(both):
    _, ours, theirs = both
    assert len(ours["absorption/letters"]) > 5
    for letter in ours["absorption/letters"]:
        for name in ("share", "full"):
            mine, other = ours[f"absorption/{letter}_{name}_raw"], theirs[f"absorption/{letter}_{name}"]
            np.testing.assert_allclose(np.float64(mine), np.float64(other), atol=1e-3, err_msg=letter)


def test_with_probes_of_its_own(both):
    """SAEBench trains probes by AdamW and keeps the epoch that is best on the test examples."""
    _, ours, theirs = both
    for name in ("scr", "tpp"):
        of_its_own = theirs[f"{name}_own"]
        print(f"\n{name} of {NS} latents: ours {ours[name].round(3)}, with its own probes {of_its_own.round(3)}")
        assert np.isfinite(of_its_own).all()
