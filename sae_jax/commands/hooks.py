"""`sae-jax hooks MODEL`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import tyro

from sae_jax import config, lm
from sae_jax.commands.show import print_lines, print_table


@dataclass(frozen=True)
class Hooks:
    """Where activations of a model can be read: its points, how wide each is, and what other libraries call it."""

    model: tyro.conf.Positional[str] = "bundled"
    """`bundled`, a local Hugging Face folder or .gguf file, or hub-id[@revision]"""


def run(argv: Sequence[str]) -> None:
    """Parse, read the sizes of the model, print its points in the order a block computes them."""
    command = config.parse(Hooks, argv, "sae-jax hooks")
    spec = lm.read_spec(command.model)
    print_lines([
        f"{command.model}: {spec.family}, layers 0 to {spec.n_layers - 1}; a hook is point.layer, as in "
        f"resid_post.{spec.n_layers // 2}",
        "",
    ])  # fmt: skip
    rows = []
    for point in lm.points(spec):
        lens, module = lm.names_elsewhere(spec, point)
        width = lm.hook_width(spec, lm.Hook(0, point))
        rows.append((point, str(width), lens.format(layer="N") or "-", module.format(layer="N")))
    print_table(("point", "width", "in TransformerLens", "in transformers (output of)"), rows)
