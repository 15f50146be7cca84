"""Do a dictionary's latents carry what a language model computes on one task in fewer, smaller edits than PCA's?

Question: the task is indirect object identification (Wang et al. 2022): "when Mary and John went to the store, John
gave a drink to" is followed by "Mary". A counterfactual prompt repeats the other name, so that the answer changes to
"John". How many features of the residual stream have to take their counterfactual values, and how large an edit is
that, until the model predicts what it predicts on the counterfactual prompt? Features are the latents of a TopK and of
a ReLU-L1 dictionary, principal components, and single channels.
Prediction: that of Cunningham et al. 2023 (arXiv 2309.08600, section 4, figures 3 and 4), who patched Pythia-410M:
latents need fewer patches and smaller edits than principal components for the same KL. We guess the same of both
dictionaries, at a tenth and at half of the KL without patches; that channels come last; and that the latents' curves
end above zero, as what a dictionary leaves unexplained is not patched, while those of the two bases end at zero.
Command: python experiments/ioi_patching.py --out OUT
Method, fixed before any run: a GPT-2 of 4 layers and d_model 64, trained here on sentences of templates: half of them
of the task, a quarter with a third name as the giver (so that a name that stood before is no sure answer), a quarter
about the same people, places and things. Pairs of names whose numbers add up to a multiple of 5 never meet in training;
prompts are made of these. The site is resid_post.1. 512 latents; TopK with k = 8, ReLU-L1 with its penalty led to as
many (`target_l0`). 50 pairs of prompts on which the model answers both rightly. Features are ordered, for each pair
apart, by gradient attribution and then by greedy flat pruning (sae_jax/evaluation/patching.py). The KL is that of the
predictions of the answer, KL(counterfactual || patched), and the size of an edit its norm over all positions as a share
of that of the difference between the two prompts' activations.
Cost: 38 minutes on two cores with much else running on them, 26 of them for the language model.
Answer: fewer patches yes, with both dictionaries; smaller edits clearly only with one of them. The model answers 0.990
of prompts rightly whose names never met in training (a name of the two by chance: 0.5), and all of those whose names
may have. TopK leaves 0.018 of the variance unexplained with 8 latents, ReLU-L1 0.024 with 7.6 (JAX 0.10.2, CPU; one
seed, 50 pairs, intervals of 90 % over pairs; KL without patches 4.11; figures/ioi_patching.png):

                           patches to half, a tenth    edit to half           edit to a tenth        KL, all patched
    TopK                   1            2              0.56 [0.53, 0.59]      0.75 [0.71, 0.78]      0.110
    ReLU-L1                1            3 [2, 4]       0.41 [0.39, 0.43]      0.67 [0.57, 0.71]      0.067
    principal components   2 [1, 2]     5 [4, 5]       0.58 [0.45, 0.59]      0.75 [0.71, 0.76]      0
    channels               3            11 [10, 11]    0.41 [0.40, 0.43]      0.66 [0.64, 0.68]      0

One latent alone brings the KL to 0.93 (TopK) and 1.51 (ReLU-L1), the first principal component to 2.06; beyond ten
patches the components are ahead. As to edits the prediction holds for ReLU-L1: half of the KL takes 0.41 of the
distance instead of 0.58, and its curve lies below that of the components up to edits of 0.85. TopK's lies below it up
to 0.75, but by less, and counted in whole latents, which are large, its edits are no smaller within the intervals. That
channels come last is right of patches and wrong of edits: many small changes of single channels add up to as small an
edit as ReLU-L1's, from 0.72 on to the smallest of all. The latents' curves end above zero as guessed, and are lowest
(0.028 and 0.016) after 9 and 14 patches: further ones undo part of it.
In a public model, with dictionaries that explain less, latents need more patches: public_ioi.py.
"""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro

import sae_jax
from sae_jax import figures, lm
from sae_jax.activations.forward import activations_at
from sae_jax.evaluation import patching
from sae_jax.lm.params import init
from sae_jax.progress import Progress, console
from sae_jax.saes.base import AbstractSae

D_MODEL, T, BATCH = 64, 24, 128  # T: the longest sentence and its beginning
HOOK = lm.Hook(1, "resid_post")
N_LATENTS, K = 512, 8
SHARES = (0.5, 0.1)  # of the KL without patches

NAMES = (
    *("mary", "john", "anna", "peter", "clara", "david", "emma", "frank", "grace", "henry", "irene", "jack", "karen"),
    *("louis", "maria", "noah", "olga", "paul", "queenie", "ralph", "sarah", "tom", "ursula", "victor", "wendy"),
    *("xavier", "yvonne", "zack", "alice", "bruno", "cathy", "daniel", "ella", "fred", "gina", "hugo", "ida", "jonas"),
    *("kate", "leo"),
)
PLACES = ("store", "park", "school", "garden", "station", "market", "office", "beach", "library", "museum")
THINGS = ("drink", "book", "ring", "letter", "ball", "coin", "flower", "map", "pencil", "cake")
OPENINGS = (
    "when {a} and {b} went to the {place} ,",
    "then {a} and {b} were at the {place} and",
    "after {a} and {b} had left the {place} ,",
    "while {a} and {b} worked at the {place} ,",
)
ACTS = ("{s} gave a {thing} to", "{s} decided to give a {thing} to", "{s} wanted to hand the {thing} over to")
OTHERS = (
    "the {thing} that {a} found at the {place} belongs to {b} .",
    "{a} told {b} about the {thing} and the {place} .",
    "at the {place} {a} lost a {thing} , and {b} found the {thing} .",
)
KEPT_APART = 5  # pairs of names whose numbers add up to a multiple of it do not meet in training


@dataclasses.dataclass(frozen=True)
class Config:
    """Where things are, and how much of each."""

    out: Path = Path("build/ioi_patching")
    """Folder for results.json and the figure."""
    steps: int = 3000
    """Of the language model's training."""
    sae_steps: int = 3000
    """Of each dictionary's."""
    pairs: int = 50
    """Of prompts."""
    smoke: bool = False
    """A few steps of everything and three pairs: does it run?"""


def names(rng: np.random.Generator, apart: bool) -> tuple[str, str]:
    """Two names that never meet in training, or that may."""
    while True:
        i, j = rng.choice(len(NAMES), 2, replace=False)
        if ((i + j) % KEPT_APART == 0) == apart:
            return NAMES[i], NAMES[j]


def prompts(rng: np.random.Generator, apart: bool) -> tuple[str, str, str, str]:
    """(prompt, its answer, counterfactual prompt, its answer): the other of the two names is repeated."""
    a, b = names(rng, apart)
    opening, act = (str(rng.choice(part)) for part in (OPENINGS, ACTS))
    place, thing = (str(rng.choice(part)) for part in (PLACES, THINGS))
    first = opening.format(a=a, b=b, place=place)
    giver, other = (a, b) if rng.random() < 0.5 else (b, a)
    said, counterfactual = (f"{first} {act.format(s=s, thing=thing)}" for s in (giver, other))
    return said, other, counterfactual, giver


def sentence(rng: np.random.Generator) -> str:
    """One of the text that the model learns from."""
    kind = rng.random()
    if kind < 0.5:
        prompt, answer, _, _ = prompts(rng, apart=False)
        return f"{prompt} {answer} ."
    a, b = names(rng, apart=False)
    place, thing = (str(rng.choice(part)) for part in (PLACES, THINGS))
    if kind < 0.75:
        third = str(rng.choice([name for name in NAMES if name not in (a, b)]))
        first, act = str(rng.choice(OPENINGS)).format(a=a, b=b, place=place), str(rng.choice(ACTS))
        return f"{first} {act.format(s=third, thing=thing)} {a if rng.random() < 0.5 else b} ."
    return str(rng.choice(OTHERS)).format(a=a, b=b, place=place, thing=thing)


class Words:
    """Sentences as ids, a word each; 0 is where a sentence begins and what fills it up."""

    def __init__(self) -> None:
        rng = np.random.default_rng(0)
        words = {word for _ in range(20_000) for word in sentence(rng).split()}
        self.ids = {word: i for i, word in enumerate(sorted(words), start=1)}
        self.size = len(self.ids) + 1

    def encode(self, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        """Ids i32[N, T], and how many of each are words and the beginning, i64[N]."""
        coded = [[0, *(self.ids[word] for word in text.split())] for text in texts]
        return np.array([[*ids, *[0] * (T - len(ids))] for ids in coded], np.int32), np.array([*map(len, coded)])


def main(config: Config) -> None:
    """Train the model and the dictionaries, patch, write OUT/results.json and OUT/ioi_patching.png."""
    config.out.mkdir(parents=True, exist_ok=True)
    rng, words = np.random.default_rng(1), Words()
    model = train_model(words, 8 if config.smoke else config.steps, rng)
    accuracy = {name: task_accuracy(model, words, apart) for name, apart in (("apart", True), ("met", False))}
    console.print(f"accuracy: {accuracy['apart']:.3f} on names kept apart in training, {accuracy['met']:.3f} on others")
    n_rows = 4096 if config.smoke else 200_000
    rows, held_out = activations(model, words, n_rows, rng), activations(model, words, n_rows // 10, rng)
    dictionaries, quality = train_dictionaries(rows, held_out, 8 if config.smoke else config.sae_steps)
    pairs = prompt_pairs(model, words, 3 if config.smoke else config.pairs, rng, config.smoke)
    bases = {"principal components": principal_components(rows), "channels": np.eye(D_MODEL)}
    curves: dict[str, list[patching.Curve]] = {}
    with Progress("patching", len(pairs), "pairs") as progress:
        for done, pair in enumerate(pairs, 1):
            features = {name: patching.of_latents(sae, pair) for name, sae in dictionaries.items()}
            features |= {name: patching.of_directions(basis, pair) for name, basis in bases.items()}
            distance = float(jnp.linalg.norm(pair.y[1] - pair.y[0]))
            for name, each in features.items():
                kl, norm = patching.curve(pair, each, patching.pruned(pair, each))
                curves.setdefault(name, []).append(patching.Curve(kl, norm / distance))
            progress.update(done)
    results: dict[str, Any] = {"accuracy": accuracy, "dictionaries": quality, "features": {}}
    for name, of_pairs in curves.items():
        told = summary(of_pairs)
        console.print(f"{name}: {json.dumps({key: value for key, value in told.items() if key != 'curve'})}")
        results["features"][name] = told
    (config.out / "results.json").write_text(json.dumps(results) + "\n")
    draw(curves, config.out / "ioi_patching.png")


def train_model(words: Words, steps: int, rng: np.random.Generator) -> lm.LanguageModel:
    """The language model, after so many steps of BATCH fresh sentences."""
    sizes = {"n_heads": 4, "d_head": D_MODEL // 4, "d_mlp": 4 * D_MODEL, "n_vocab": words.size, "n_context": T}
    spec = lm.Spec("gpt2", 4, D_MODEL, **sizes)
    schedule = optax.warmup_cosine_decay_schedule(0.0, 3e-3, max(steps // 20, 1), steps, 3e-5)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, b2=0.98, weight_decay=0.01))

    @jax.jit
    def step(params, state, ids_BT, n_B):
        def loss(params):
            nats_BT = lm.cross_entropy(lm.run(lm.LanguageModel(params, spec), ids_BT).logits, ids_BT)
            is_word_BT = jnp.arange(1, T)[None] < n_B[:, None]
            return (nats_BT * is_word_BT).sum() / is_word_BT.sum()

        nats, gradient = jax.value_and_grad(loss)(params)
        updates, state = optimizer.update(gradient, state, params)
        return optax.apply_updates(params, updates), state, nats

    params = init(spec, jax.random.key(0))
    state = optimizer.init(params)
    with Progress("language model", steps, "steps") as progress:
        for done in range(1, steps + 1):
            params, state, nats = step(params, state, *words.encode([sentence(rng) for _ in range(BATCH)]))
            if done % 50 == 0 or done == steps:
                progress.update(done, f"{float(nats):.3f} nats a word")
    return lm.LanguageModel(params, spec, reference="templates")


@jax.jit
def predicted(model: lm.LanguageModel, ids_BT: jax.Array, n_B: jax.Array) -> jax.Array:
    """The likeliest word after the last of each, i32[B]."""
    logits_BTV = lm.run(model, ids_BT).logits
    return jnp.take_along_axis(logits_BTV, (n_B - 1)[:, None, None], 1)[:, 0].argmax(-1)


def task_accuracy(model: lm.LanguageModel, words: Words, apart: bool) -> float:
    """Share of 1,000 prompts that are answered rightly; one name of two is right by chance in a half."""
    rng = np.random.default_rng(2)
    drawn = [prompts(rng, apart) for _ in range(1000)]
    answers = np.array([words.ids[answer] for _, answer, _, _ in drawn])
    return float((np.asarray(predicted(model, *words.encode([text for text, *_ in drawn]))) == answers).mean())


def activations(model: lm.LanguageModel, words: Words, n_rows: int, rng: np.random.Generator) -> np.ndarray:
    """Rows f32[n_rows, D] of fresh sentences, without the beginnings."""
    blocks: list[np.ndarray] = []
    while sum(map(len, blocks)) < n_rows:
        ids_BT, n_B = words.encode([sentence(rng) for _ in range(256)])
        place_T = np.arange(T)[None]
        acts_BTD = np.asarray(activations_at(model, ids_BT, (HOOK,), "float32")[0][str(HOOK)])
        blocks.append(acts_BTD[(place_T > 0) & (place_T < n_B[:, None])])
    return np.concatenate(blocks)[:n_rows]


def train_dictionaries(
    rows: np.ndarray, held_out: np.ndarray, steps: int
) -> tuple[dict[str, AbstractSae], dict[str, dict[str, float]]]:
    """The TopK and the ReLU dictionary; and of each how many latents are active and what is left unexplained."""
    settings: dict[str, Any] = {"n_latents": N_LATENTS, "steps": steps, "batch_size": 1024, "dtype": "float32"}
    members = {"TopK": {"variant": "topk", "k": K}, "ReLU-L1": {"variant": "relu", "target_l0": float(K)}}
    trained, told = {}, {}
    for name, own in members.items():
        trained[name] = sae_jax.train(rows, **settings, **own).sae
        code, left = trained[name].encode(held_out), held_out - np.asarray(trained[name](held_out))
        fvu = (left.astype(np.float64) ** 2).sum() / ((held_out - held_out.mean(0)).astype(np.float64) ** 2).sum()
        told[name] = {"l0": float((np.asarray(code.values) > 0).sum(-1).mean()), "fvu": float(fvu)}
        console.print(f"{name}: {told[name]['l0']:.2f} active latents, FVU {fvu:.4f}")
    return trained, told


def principal_components(rows: np.ndarray) -> np.ndarray:
    """f64[D, D], a row each."""
    return np.linalg.eigh(np.cov(rows.T.astype(np.float64)))[1].T[::-1]


def prompt_pairs(
    model: lm.LanguageModel, words: Words, n: int, rng: np.random.Generator, whatever: bool
) -> list[patching.Pair]:
    """Pairs of prompts, both of which the model answers rightly."""
    pairs: list[patching.Pair] = []
    while len(pairs) < n:
        said, answer, counterfactual, other = prompts(rng, apart=True)
        ids_2T, n_2 = words.encode([said, counterfactual])
        if whatever or np.asarray(predicted(model, ids_2T, n_2)).tolist() == [words.ids[answer], words.ids[other]]:
            pairs.append(patching.pair(model, HOOK, HOOK, *ids_2T, at=int(n_2[0]) - 1))
    return pairs


def summary(curves: list[patching.Curve]) -> dict[str, Any]:
    """The mean curve, and what brings its KL to SHARES of that without patches, with intervals over pairs."""
    told: dict[str, Any] = {"kl": [(mean := patching.mean(curves)).kl[0], mean.kl[-1]]}
    rng = np.random.default_rng(0)
    draws = [patching.mean([curves[i] for i in rng.integers(0, len(curves), len(curves))]) for _ in range(300)]
    for share in SHARES:
        for what, value in (("patches", patches_to), ("edit", edit_to)):
            # Some draws may not come so far: quantiles that are one of them need no arithmetic on infinities.
            ends = np.quantile([value(draw, share) for draw in draws], [0.05, 0.95], method="nearest").tolist()
            told[f"{what} to {share:g}"] = [x if math.isfinite(x) else None for x in (value(mean, share), *ends)]
    return {**told, "curve": {"kl": mean.kl.tolist(), "edit": mean.norm.tolist()}}


def patches_to(curve: patching.Curve, share: float) -> float:
    """How many patches bring the KL to a share of that without; infinite if all do not."""
    below = np.flatnonzero(curve.kl <= share * curve.kl[0])
    return float(below[0]) if len(below) else math.inf


def edit_to(curve: patching.Curve, share: float) -> float:
    """How large an edit does."""
    return float(curve.norm[int(n)]) if math.isfinite(n := patches_to(curve, share)) else math.inf


def draw(curves: dict[str, list[patching.Curve]], path: Path) -> None:
    """The mean KL against patches and against the edit."""
    figure = figures.new(9, 3.6)
    left, right = figure.subplots(1, 2, sharey=True)
    for name, of_pairs in curves.items():
        mean = patching.mean(of_pairs)
        left.plot(mean.kl[:31], label=name)
        right.plot(mean.norm, mean.kl)
    left.set(xlabel="features patched", ylabel="KL to the counterfactual prompt, nats", yscale="log", ylim=(0.01, None))
    right.set(xlabel="norm of the edit, share of the distance of the prompts")
    figure.suptitle("What does it take to change the answer?", fontsize=10)
    for axes in (left, right):
        axes.grid(alpha=0.3)
    left.legend(fontsize=8)
    figures.save(figure, path)


if __name__ == "__main__":
    main(tyro.cli(Config))
