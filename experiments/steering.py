"""Does a text that is steered with a latent come to be about what the latent stands for?

Question: twenty latents of the demo's dictionary (2,048 latents, k = 16, resid_post.2 of the bundled model), drawn over
the range of densities, are clamped to multiples of their largest value while the model writes after eight prompts.
Nobody judges the texts: each is read back by the model as it is, without steering, and shows the latent's concept if
the latent itself fires on what was written to at least a quarter of its largest value. As a control, the same is asked
of the nineteen texts that were steered with the other latents. How often, against scale, and what does it cost?
Guess, before any text was made: at scale 1 half of the texts show it and fewer than 5 % of the controls; more at 2 and
5, with cost: the nats a token of the written text, by the unsteered model, double by scale 5. Rare latents need larger
scales, since their largest value is on few rows.
Latents, drawn before any text was made: 173, 440, 477, 506, 654, 935, 1070, 1159, 1209, 1275, 1321, 1517, 1582, 1585,
1634, 1703, 1803, 1805, 1968, 2040.
Then the same, with beginnings of English sentences, of SmolLM2-135M-Instruct: the TopK dictionary of resid_post.15 that
real_model.py makes, latents 8, 115, 169, 172, 394, 741, 764, 781, 797, 802, 894, 943, 950, 1006, 1206, 1305, 1696,
1814, 2015, 2030, drawn with the first answer known and before any text of this model. Guess: as there, seldom, at scale
2 a tenth of the texts more than of the controls; half of the layers come after, so more than in the small model.
Command: python experiments/steering.py --out OUT [--run RUN]
Cost: three minutes on two cores that had much else to do, with the demo's run at hand.
Answer: seldom. Twenty latents, eight prompts, 24 tokens written (figures/steering.png; JAX 0.10.2, CPU):

    scale                              unsteered  0      0.5    1      2      5      10
    texts that show the latent         0.056      0.056  0.062  0.106  0.119  0.087  0.069
    texts steered with others that do  0.056      0.057  0.052  0.050  0.044  0.018  0.012
    nats a token of the text           1.288      1.291  1.304  1.500  2.573  4.208  4.838

Steering tells: at scale 2 a text is nearly three times as likely to show its own latent as another's. But the guess was
far off: of the twenty, four show in more than a third of their texts at scale 2 and far more than in those left alone
(173, 440, 1321, 2040), one at 5 and 10 alone (1517), and eight at no scale. The price is higher than guessed, too: nats
double at scale 2, not 5. One reason lies in what was asked: a latent of the residual stream stands for what the model
has read, and steering makes the model write what would follow that, in which the latent itself need not fire.
SmolLM2-135M-Instruct (eleven minutes of writing; figures/steering_smollm2.png):

    scale                              unsteered  0      0.5    1      2      5      10
    texts that show the latent         0.081      0.075  0.075  0.131  0.169  0.181  0.287
    texts steered with others that do  0.081      0.080  0.057  0.041  0.030  0.019  0.016
    nats a token of the text           1.271      1.270  1.296  1.439  2.108  2.906  2.768

At scale 2 fourteen points more than the controls, a little above the guess, and with half of the layers to come it
goes on rising where the small model's fell: at 10 three latents (169, 781, 1206) show in all of their texts and in
none at 2, and 764 in all from 5 on. Five (115, 394, 802, 943, 2015) never do. Nats fall again at 10, as they do for a
text that repeats itself.
"""

from __future__ import annotations

import dataclasses
import json
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from bundled import demo_run

import sae_jax
from sae_jax import figures, lm
from sae_jax.commands.show import print_table
from sae_jax.evaluation import prompts, steering
from sae_jax.evaluation.text import held_out, open_set
from sae_jax.progress import Progress

N_LATENTS, SEED = 20, 0
SCALES = (0.0, 0.5, 1.0, 2.0, 5.0, 10.0)
PROMPTS = (
    "def parse(self, text, strict=False):\n    ",
    "class Reader(object):\n    def __init__(self, ",
    "import os\nimport sys\nimport re\n\n",
    "for name in sorted(names):\n        ",
    "    # This is what happens when ",
    "    return [item for item in ",
    'raise ValueError("the name of the file ',
    "with open(path) as file:\n    ",
)
PROSE = (  # for models of English
    "I went to the market this morning and bought",
    "The report that was published yesterday says that",
    "When she opened the door of the old house",
    "The patient was admitted to the hospital with",
    "My favourite thing about this film is the",
    "In the last year the company has been",
    "The teacher asked the children to write about",
    "He looked at the sky and thought of",
)
N_PROMPT, N_NEW = 8, 24  # tokens: of prompts of one length, one program is compiled
SHOWS = 0.25  # of the largest value
BATCH, LENGTH = 64, 64  # of texts that are read at once, and tokens that each is filled up to


@dataclasses.dataclass(frozen=True)
class Config:
    """Where things are."""

    out: Path = Path("build/steering")
    """Folder for the set and the dictionary, results.json and steering.png."""
    run: Path | None = None
    """The run that sae-jax demo made; trained in `out` if not given. Or one of a model of English (real_model.py)."""
    draw: bool = False
    """Only draw the latents and print them."""
    smoke: bool = False
    """Two latents, one prompt, a small dictionary: does it run?"""


def main(config: Config) -> None:
    """Draw latents, steer, read back, count; OUT/results.json and a figure."""
    folder = config.run or demo_run(config.out, config.smoke)
    d = sae_jax.load(folder)
    activations = open_set(d.record)
    subject = prompts.subject(d.sae, d.record, activations)
    latents, densities = drawn(subject, activations, d.record.sites, 2 if config.smoke else N_LATENTS)
    print_table(
        ("latent", "density"), [(str(i), f"{density:.2g}") for i, density in zip(latents, densities, strict=True)]
    )
    if config.draw:
        return
    largest_L = steering.largest_values(d.sae, activations, d.record.sites.x, latents)
    of = PROMPTS if subject.model.reference == "bundled" else PROSE
    written = texts_of(subject, latents, largest_L, of[: 1 if config.smoke else None])
    shows, nats = read_back(subject, written, latents, largest_L)
    results = [row(scale, shows[:, at], nats[:, at]) for at, scale in enumerate((None, *SCALES))]
    by_latent = {int(latent): shows[i, :, :, i].mean(1).tolist() for i, latent in enumerate(latents)}
    config.out.mkdir(parents=True, exist_ok=True)
    content = {"scales": results, "by_latent": by_latent, "densities": dict(zip(map(int, latents), densities))}  # noqa: B905
    (config.out / "results.json").write_text(json.dumps(content, indent=2) + "\n")
    print_table(tuple(results[0]), [tuple(str(value) for value in one.values()) for one in results])
    draw(results, config.out / "steering.png")


def drawn(subject, activations, sites, n: int) -> tuple[list[int], list[float]]:
    """Latents at even steps of the order by density, of those that fire on at least 5 of 32,768 held-out tokens."""
    text = held_out(activations, sites, 2**15)
    assert text is not None
    rows_ND = text.rows()
    code = subject.sae.encode(rows_ND)
    counts_F = np.bincount(
        np.asarray(code.indices).ravel(), np.asarray(code.values).ravel() > 0, minlength=len(subject.sae.b_enc)
    )
    alive = np.flatnonzero(counts_F >= 5)
    order = alive[np.argsort(counts_F[alive], kind="stable")]
    latents = np.sort(order[np.linspace(0, len(order) - 1, n + 2).round().astype(int)[1:-1]])
    return latents.tolist(), (counts_F[latents] / len(rows_ND)).tolist()


def texts_of(
    subject: prompts.Subject, latents: list[int], largest_L: np.ndarray, of: tuple[str, ...]
) -> list[list[list[np.ndarray]]]:
    """Token ids [latent][scale, unsteered first][prompt], i32[N_PROMPT + N_NEW] each."""
    written: list[list[list[np.ndarray]]] = []
    ids_PT = np.stack([subject.ids(prompt)[:N_PROMPT] for prompt in of])
    with Progress("steer", len(latents), "latents") as progress:
        for i, latent in enumerate(latents):
            steered = steering.write(subject, ids_PT, [latent], largest_L[i : i + 1], SCALES, n_new=N_NEW)
            written.append(
                [[np.concatenate(both) for both in zip(ids_PT, new_PN, strict=True)] for _, new_PN in steered]
            )
            progress.update(i + 1)
    return written


def read_back(
    subject: prompts.Subject, written: list[list[list[np.ndarray]]], latents: list[int], largest_L: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """(bool[steered by, scale, prompt, latent]: whether it shows, f64[steered by, scale, prompt]: nats a token)."""
    shape = (len(written), len(written[0]), len(written[0][0]))
    shows, nats = np.zeros((*shape, len(latents)), bool), np.zeros(shape)
    model = subject.model
    assert isinstance(model, lm.LanguageModel)
    places = list(np.ndindex(*shape))
    with Progress("read back", len(places), "texts") as progress:
        for first in range(0, len(places), BATCH):
            here = places[first : first + BATCH]
            texts = [written[i][j][k] for i, j, k in here]
            ids_BT = np.stack(
                [np.pad(ids, (0, LENGTH - len(ids))) for ids in texts + [texts[0]] * (BATCH - len(texts))]
            )
            acts, losses_BT = read(model, jnp.asarray(ids_BT), subject.encoded)
            code = subject.sae.encode(acts)
            new, own = np.asarray(code.indices)[:, N_PROMPT:], np.asarray(code.values)[:, N_PROMPT:]
            for at, ids, latents_TK, values_TK, losses_T in zip(
                here, texts, new, own, np.asarray(losses_BT), strict=False
            ):
                n_new = len(ids) - N_PROMPT
                is_text_T1 = ~np.isin(ids[N_PROMPT:], subject.tokenizer.special_ids)[:, None]
                latents_TK, values_TK = latents_TK[:n_new], values_TK[:n_new] * is_text_T1
                for i, latent in enumerate(latents):
                    largest = values_TK[latents_TK == latent].max(initial=0.0)
                    shows[(*at, i)] = largest >= SHOWS * largest_L[i] > 0
                nats[at] = losses_T[N_PROMPT - 1 : len(ids) - 1].mean()
            progress.update(first + len(here))
    return shows, nats


@partial(jax.jit, static_argnames="hooks")
def read(model: lm.LanguageModel, ids_BT: jax.Array, hooks: tuple[lm.Hook, ...]) -> tuple[jax.Array, jax.Array]:
    """(what is encoded f32[B, T, X], cross-entropy of each next token f32[B, T - 1])."""
    out = lm.run(model, ids_BT, capture=hooks)
    assert out.logits is not None
    return jnp.concatenate([out.acts[hook] for hook in hooks], -1), lm.cross_entropy(out.logits, ids_BT)


def row(scale: float | None, shows: np.ndarray, nats: np.ndarray) -> dict[str, float | str | None]:
    """Of one scale: bool[steered by, prompt, latent] and f64[steered by, prompt]."""
    n = shows.shape[0]
    own = shows[np.arange(n), :, np.arange(n)].mean()
    others = shows.mean(1)[~np.eye(n, dtype=bool)].mean() if n > 1 else float("nan")
    return {
        "scale": "unsteered" if scale is None else scale,
        "shows its concept": round(float(own), 3),
        "shows another's": round(float(others), 3),
        "nats a token": round(float(nats.mean()), 3),
    }


def draw(results: list[dict], path: Path) -> None:
    """Rates and nats against scale."""
    figure = figures.new(8.4, 3.6)
    left, right = figure.subplots(1, 2)
    names = [str(one["scale"]) for one in results]
    for key in ("shows its concept", "shows another's"):
        left.plot(names, [one[key] for one in results], marker="o", label=key)
    left.set(ylabel="share of texts", xlabel="scale, of the largest value", ylim=(0, 1))
    left.legend(fontsize=8)
    right.plot(names, [one["nats a token"] for one in results], marker="o", color="C3")
    right.set(ylabel="nats a token of the text, unsteered model", xlabel="scale, of the largest value")
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.tick_params(axis="x", labelsize=8)
    figure.suptitle("Does the text come to be about what the latent stands for?", fontsize=10)
    figures.save(figure, path)


if __name__ == "__main__":
    main(tyro.cli(Config))
