"""`sae-jax advise --compute 1e18 --fit FIT.json`: what to train for a budget, by the laws of a fit."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from sae_jax import config, storage
from sae_jax.errors import UsageError, UserError
from sae_jax.planning import targets
from sae_jax.saes import base
from sae_jax.scaling import fit, flops
from sae_jax.types import Widths

STORED_BYTES = 2  # a number of an activation set, bfloat16
FAR = 10  # times the largest of the points; a law is not shown to hold beyond


@dataclass(frozen=True)
class Advise:
    """The width, tokens and learning rate for a budget, and the error to expect."""

    compute: float
    """FLOP to spend, in the unit of the table: 12 * n_latents * d_model a token"""
    fit: str
    """fit.json, as `sae-jax fit` wrote it"""
    k: int | None = None
    """active latents; another k than the fit's goes by the joint law"""
    target: str | None = None
    """machines to give hours for: h200:8, v5p:2x2x2 and the like"""
    mfu: float = 0.3
    """share of the matrix rate that the run is taken to reach"""

    def __post_init__(self) -> None:
        if not 0 < self.compute < math.inf:
            raise UsageError(f"--compute={self.compute} must be above 0 and finite")
        if self.k is not None and self.k < 1:
            raise UsageError(f"--k={self.k} must be at least 1")
        if not 0 < self.mfu <= 1:
            raise UsageError(f"--mfu={self.mfu} must be above 0 and at most 1")


def run(argv: Sequence[str]) -> None:
    """Parse, advise, show."""
    command = config.parse(Advise, argv, "sae-jax advise")
    rows, notes = advise(command)
    table = Table("", "", title=f"{command.compute:.3g} FLOP", show_header=False)
    for row in rows:
        table.add_row(*row)
    said = Console(highlight=False, soft_wrap=True)
    said.print(table)
    for note in notes:
        said.print(note, markup=False)


def advise(command: Advise) -> tuple[list[tuple[str, str]], list[str]]:
    """(what, value) of the advice, and what to keep in mind. Raises UserError if the fit lacks what it takes."""
    target = targets.parse(command.target) if command.target else None
    content = storage.read_json(command.fit)
    if content is None:
        raise UsageError(f"--fit={command.fit}: there is no such file; write one with `sae-jax fit DIR`")
    try:
        return _advise(command, content, target)
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{command.fit}: not what `sae-jax fit` writes ({error!r}); write it again") from None


def _advise(
    command: Advise, content: dict[str, Any], target: targets.Target | None
) -> tuple[list[tuple[str, str]], list[str]]:
    laws = _laws(command.fit, content)
    k, d_model = command.k or content["k"], content["d_model"]
    wanted = laws["best_latents"].predict(command.compute)
    n = 2 ** max(0, round(math.log2(wanted)))
    if k is not None and n < k:
        raise UserError(f"--compute={command.compute:g} buys {n} latents, fewer than k={k}; spend more")
    cost = content["flops_per_token"]
    tokens = command.compute / (cost["per_latent"] * n + cost["per_active"] * (k or 0))
    error, draws_R, notes = laws["compute"].predict(command.compute), laws["compute"].draw(command.compute), []
    if k is not None and k != content["k"]:
        if "joint" not in laws:
            raise UsageError(f"--k={k}: {command.fit} is at k={content['k']} and has no joint law; fit with --k={k}")
        joint, k_fitted = laws["joint"], content["k"]
        error = error * joint.predict(n, k) / joint.predict(n, k_fitted)
        draws_R = draws_R * joint.draw(n, k) / joint.draw(n, k_fitted) if len(joint.draws) else draws_R[:0]
        notes.append(f"the error at k={content['k']} carried to k={k} by the joint law")
    sae = config.from_dict(
        base.config_class(content["variant"]),
        {"variant": content["variant"], "n_latents": n, **({} if k is None else {"k": k})},
    )
    if "lr" in laws:
        lr, by = laws["lr"].predict(n), _within(laws["lr"].draw(n), ".3g")
    else:
        used = content["lr_of_points"]
        lr, by = used["coefficient"] * n ** used["exponent"], " (as the points had: the fit has no rule)"
    rows = [
        ("latents", f"{n} (the law says {wanted:.0f}{_within(laws['best_latents'].draw(command.compute), '.0f')})"),
        ("k", "none" if k is None else str(k)),
        ("tokens", f"{tokens:,.0f}"),
        ("learning rate", f"{lr:.3g}{by}"),
        ("FVU expected", f"{error:.4g}{_within(draws_R, '.4g')}"),
    ]
    if d_model is not None:
        rows.append(("set on disk", f"{tokens * d_model * STORED_BYTES / 1e9:,.3g} GB"))
    if target is not None:
        if d_model is None:
            raise UsageError(
                f"--target={target.name}: {command.fit} has no d_model, as its table had none; leave it out"
            )
        work = tokens * flops.executed(sae, Widths.one(d_model))
        hours = work / (target.chip.flops * target.n_devices * command.mfu) / 3600
        rows.append((f"hours on {target.name}", f"{hours:,.3g} at {command.mfu:.0%} of the matrix rate"))
    beyond = {"FLOP": command.compute / laws["compute"].range["x"][1]}
    beyond["latents"] = n / content["widest"]
    notes += [
        f"{what}: {factor:,.3g} times the largest that was fitted" for what, factor in beyond.items() if factor > 1
    ]
    return rows, notes


def _laws(path: str, content: dict[str, Any]) -> dict[str, fit.Law]:
    """The laws to predict by. Raises UserError, with the fit's reason, if one that advice needs was left out."""
    compute = content["compute"]
    found = {"compute": compute, "best_latents": compute and compute["best_latents"]}
    for name, law in found.items():
        if law is None:
            reason = next((each for each in content["warnings"] if each.startswith(f"{name}: left out")), name)
            raise UserError(f"{path} has too little to advise by: {reason}")
    found |= {name: content[name] for name in ("joint", "lr") if content[name]}
    if not compute["has_constant"]:
        found["compute"] = compute["without_constant"]
    return {name: fit.Law.of(law, content["draws"][name]) for name, law in found.items()}


def _within(draws_R: np.ndarray, form: str) -> str:
    ends = fit.ends(draws_R)
    return f", {fit.LEVEL:.0%} interval {ends[0]:{form}} to {ends[1]:{form}}" if ends else ""
