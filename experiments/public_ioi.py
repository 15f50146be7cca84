"""Do latents carry indirect object identification in fewer, smaller edits than components, in a public model too?

Question: that of ioi_patching.py, of a model that nobody trained for it: SmolLM2-135M-Instruct on sentences of plain
English, "When Mary and John went to the store, John gave a drink to" and the same with Mary giving. How many features
have to take their counterfactual values, and how large an edit is that, until the KL of the prediction is a half and a
tenth of what it is without?
Prediction, before any patching run, with the answer of the small model known: latents of both dictionaries need fewer
patches than principal components, and channels most of all, at a half and at a tenth. ReLU-L1's edit at half of the KL
is smaller than that of components, TopK's is not by more than the intervals. What the dictionaries leave unexplained is
several times as much as there, so their curves end higher, above a tenth of the KL without patches: there the number of
latents for a tenth may not exist. More patches than there everywhere, some tens for components.
Command: python experiments/public_ioi.py --out OUT     (OUT of public_suite.py, whose dictionaries these are)
Method, fixed before any run: dictionaries and set of public_suite.py, resid_post.15, the middle of 30 blocks: late
enough that the second name has been read as a repetition, early enough that the answer is not yet written out, and
where real_model.py measured what reconstructions cost. Names of one token; the two prompts of a pair differ in one
token. Pairs count if the answer is the likeliest of all tokens on both prompts. Features are ordered by attribution,
and the first 16 of them then by greedy flat pruning among themselves (64 were meant to be; a trial for time of one pair
and of TopK made them fewer); curves are followed for 64 patches. Measures and intervals are those of ioi_patching.py.
Cost: 15 minutes on two cores that had other work, with the dictionaries at hand.
Answer: no, the small model's result does not hold here. SmolLM2 answers 0.720 of 400 prompts rightly, and both of a
pair in 0.515 of 200; the first 20 of such pairs were patched (one seed, JAX 0.12.0.1, CPU; intervals of 90 %
over pairs; KL without patches 2.03; figures/public_ioi.png):

                           patches to half     edit to half           KL after 5, 64, all
    TopK                   13 [9, 24]          0.37 [0.33, 0.46]      1.39   0.80   0.62
    ReLU-L1                19 [12, 30]         0.35 [0.32, 0.38]      1.41   0.78   0.61
    principal components   9 [8, 11]           0.37 [0.36, 0.40]      1.31   0.51   0
    channels               7 [4, 12]           0.39 [0.35, 0.44]      1.14   0.50   0

Of patches the prediction is wrong all through: channels need fewest, components are next and latents need most, though
most intervals meet. Of edits it holds in part: at half of the KL ReLU-L1's is the smallest, but all four are of a size
within the intervals; and at equal size the latents' edits leave less up to 0.35 of the distance (at 0.3 TopK 1.20 nats
and ReLU-L1 1.14, components 1.38, channels 1.39; no intervals were taken there). A tenth nothing reaches in 64 patches,
and latents would never, as predicted: with all of them patched 30 % of the KL is left. That may be the reason for the
rest: a base patches all that differs, a dictionary what it explains, which of this layer is three quarters of the
variance, after 100,000 tokens of other text. Better dictionaries may need fewer patches; these do not.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import public_suite
import tyro
from ioi_patching import ACTS, NAMES, PLACES, THINGS, draw, principal_components, summary

import sae_jax
from sae_jax import lm
from sae_jax.evaluation import patching, prompts
from sae_jax.evaluation.text import open_set
from sae_jax.progress import Progress, console

OPENINGS = (
    "When {a} and {b} went to the {place},",
    "Then {a} and {b} were at the {place}, and",
    "After {a} and {b} had left the {place},",
    "While {a} and {b} worked at the {place},",
)
N_TESTED = 200  # pairs, on which accuracy is told
PRUNED, FOLLOWED = 16, 64  # features that are pruned, and patches that a curve is followed for
N_ROWS = 2**15  # of the set, that principal components are taken of


@dataclasses.dataclass(frozen=True)
class Config:
    """Where things are, and how much of each."""

    out: Path = Path("build/public_suite")
    """Folder of public_suite.py; ioi.json and public_ioi.png are written there."""
    pairs: int = 20
    """Of prompts."""
    smoke: bool = False
    """The bundled model, two pairs whatever it answers: does it run?"""


class Prompts(NamedTuple):
    """A prompt and its counterfactual, and what they are followed by."""

    said: np.ndarray  # i32[T]
    counterfactual: np.ndarray  # i32[T]
    answer: int
    other: int


def main(config: Config) -> None:
    """Draw pairs, patch, write OUT/ioi.json and OUT/public_ioi.png."""
    folders = public_suite.dictionaries(public_suite.settings(public_suite.Config(config.out, smoke=config.smoke)))
    loaded = {name: sae_jax.load(folder) for name, folder in folders.items()}
    first = next(iter(loaded.values()))
    activations = open_set(first.record)
    subject = prompts.subject(first.sae, first.record, activations)
    (hook,), model = subject.encoded, subject.model
    assert isinstance(model, lm.LanguageModel)
    drawn = pairs_of(subject, 2 if config.smoke else N_TESTED)
    longest = max(len(pair.said) for pair in drawn)
    right = np.array([[says(model, ids, longest) for ids in pair[:2]] for pair in drawn])
    right = right == np.array([pair[2:] for pair in drawn])
    console.print(
        f"accuracy: {right.mean():.3f} of {right.size} prompts, both of {right.all(1).mean():.3f} of the pairs"
    )
    taken = [pair for pair, both in zip(drawn, right.all(1), strict=True) if both or config.smoke][: config.pairs]
    rows = np.concatenate([activations.read_chunk(str(hook), i) for i in range(activations.n_chunks)])[:N_ROWS]
    bases = {"principal components": principal_components(rows.astype(np.float32)), "channels": np.eye(rows.shape[1])}
    curves: dict[str, list[patching.Curve]] = {}
    ends: dict[str, list[float]] = {}
    with Progress("patching", len(taken), "pairs") as progress:
        for done, (said, counterfactual, _, _) in enumerate(taken, 1):
            # Filled up to one length, so that pairs share programs.
            pair = patching.pair(model, hook, hook, *filled([said, counterfactual], longest), at=len(said) - 1)
            features = {name: patching.of_latents(each.sae, pair) for name, each in loaded.items()}
            features |= {name: patching.of_directions(basis, pair) for name, basis in bases.items()}
            distance = float(jnp.linalg.norm(pair.y[1] - pair.y[0]))
            orders = patching.pruned_together([(pair, each) for each in features.values()], PRUNED)
            for (name, each), order in zip(features.items(), orders, strict=True):
                kl, norm = patching.curve(pair, each, order, FOLLOWED)
                curves.setdefault(name, []).append(patching.Curve(kl, norm / distance))
                ends.setdefault(name, []).append(patching.all_patched(pair, each))
            progress.update(done)
    results: dict[str, Any] = {"accuracy": right.mean(), "both": right.all(1).mean(), "pairs": len(taken)}
    for name, of_pairs in curves.items():
        told = {**summary(of_pairs), "kl of all": float(np.mean(ends[name]))}
        console.print(f"{name}: {json.dumps({key: value for key, value in told.items() if key != 'curve'})}")
        results[name] = told
    (config.out / "ioi.json").write_text(json.dumps(results) + "\n")
    draw(curves, config.out / "public_ioi.png")


def pairs_of(subject: prompts.Subject, n: int) -> list[Prompts]:
    """Pairs of prompts of equal length, whose names and answers are one token each."""
    rng, tokenizer = np.random.default_rng(1), subject.tokenizer
    spaced = {name: tokenizer.encode([f" {name.capitalize()}"])[0] for name in NAMES}
    names = [name for name, ids in spaced.items() if len(ids) == 1] or [*NAMES]  # the bundled model knows none
    drawn: list[Prompts] = []
    while len(drawn) < n:
        a, b = (str(name) for name in rng.choice(names, 2, replace=False))
        opening, act = (str(rng.choice(part)) for part in (OPENINGS, ACTS))
        place, thing = str(rng.choice(PLACES)), str(rng.choice(THINGS))
        giver, other = (a, b) if rng.random() < 0.5 else (b, a)
        start = opening.format(a=a.capitalize(), b=b.capitalize(), place=place)
        said, counterfactual = (
            subject.ids(f"{start} {act.format(s=s.capitalize(), thing=thing)}") for s in (giver, other)
        )
        if len(said) == len(counterfactual):
            drawn.append(Prompts(said, counterfactual, spaced[other][0], spaced[giver][0]))
    return drawn


def says(model: lm.LanguageModel, ids_T: np.ndarray, longest: int) -> int:
    """The likeliest token after a prompt of at most so many."""
    return int(_says(model, np.stack(filled([ids_T], longest)), jnp.int32(len(ids_T) - 1)))


def filled(ids: list[np.ndarray], length: int) -> list[np.ndarray]:
    """Token ids at this length; what fills them up comes after what counts."""
    return [np.pad(ids_T, (0, length - len(ids_T))) for ids_T in ids]


@jax.jit
def _says(model: lm.LanguageModel, ids_1T: jax.Array, at: jax.Array) -> jax.Array:
    logits_11V = lm.run(model, ids_1T, logits_at=at).logits
    assert logits_11V is not None
    return logits_11V[0, 0].argmax()


if __name__ == "__main__":
    main(tyro.cli(Config))
