"""N2G patterns of latents that are shown: what text, at the least, each fires on (evaluation/n2g.py)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np

from sae_jax.analysis.examples import Activations
from sae_jax.evaluation.n2g import Example, in_model, make_patterns
from sae_jax.evaluation.prompts import Subject
from sae_jax.pages.latents import Pattern

N_EXAMPLES = 6  # of each latent
LONGEST = 16  # tokens of a pattern
N_SHOWN = 4  # of each latent


def strongest(table: Activations, w_dec: np.ndarray, latents: np.ndarray, n: int) -> list[int]:
    """Those n of latents i64[L] that write most where they fire: their mean value times their decoder norm."""
    active = latents[table.counts[latents] > 0]
    written = [table.of_latent(f)[1].mean() * np.linalg.norm(w_dec[f]) for f in active.tolist()]
    return active[np.argsort(-np.array(written), kind="stable")[:n]].tolist()


def patterns_of(subject: Subject, table: Activations, latents: Sequence[int]) -> dict[int, list[Pattern]]:
    """Patterns of the strongest contexts of latents, commonest first; none where they take more than LONGEST tokens.

    Some hundred texts of at most LONGEST tokens are run for each latent.
    """
    examples = [example for latent in latents for example in _examples(subject, table, latent)]
    room = (subject.model.spec.n_context or LONGEST + 2) - 2  # what stands before a pattern
    ids = table.sequences[table.has_row]
    neutral = int(np.bincount(ids[~np.isin(ids, subject.tokenizer.special_ids)]).argmax())
    made = make_patterns(examples, in_model(subject), subject.first, neutral, min(LONGEST, room))
    counts: dict[int, Counter[tuple[int, ...]]] = {latent: Counter() for latent in latents}
    for example, pattern in zip(examples, made, strict=True):
        if pattern is not None:
            counts[example.latent][pattern] += 1
    return {latent: of_latent.most_common(N_SHOWN) for latent, of_latent in counts.items()}


def _examples(subject: Subject, table: Activations, latent: int) -> list[Example]:
    top = table.top(latent, N_EXAMPLES, one_per_sequence=True)
    examples = []
    for seq, pos, value in zip(top.seq, top.pos, top.value.tolist(), strict=True):
        text = table.sequences[seq, : pos + 1]
        text = text if text[0] == subject.first else np.append(np.int32(subject.first), text)
        if len(text) > 1:
            examples.append(Example(text, latent, value))
    return examples
