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
prompts are made of these. The site is resid_post.1. 512 latents; TopK with k = 8, ReLU-L1 with that one of six
coefficients whose L0 on held-out rows is nearest to it. 50 pairs of prompts on which the model answers both rightly.
Features are ordered, for each pair apart, by gradient attribution and then by greedy flat pruning
(sae_jax/evaluation/patching.py); KL is that of the predictions of the answer, KL(counterfactual || patched), and the
edit its norm over all positions as a share of that of the difference between the two prompts' activations.
Answer: not run yet.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np

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
