"""Hooks: the places of a model where activations can be read and changed, a layer and a point inside its block.

With x the residual stream, a block computes

    resid_pre = x                         attn_in   = norm(x)
    attn_z    = softmax(q k' / sqrt(d)) v, per head
    attn_out  = attn_z W_o + b_o          resid_mid = resid_pre + attn_out
    mlp_in    = norm(resid_mid)           mlp_act   = act(mlp_in W_up + b_up), times or not a second product
    mlp_out   = mlp_act W_down + b_down   resid_post = resid_mid + mlp_out

Not every family has every point. Where both parts read resid_pre there is no resid_mid. Where outputs are normalised
before they join the stream (Gemma 2 and 3), attn_raw and mlp_raw are what they were before; attn_out and mlp_out are
what joins it. A hook is written `point.layer`, as in `resid_post.2`; layers count from 0.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from sae_jax.lm.family import family
from sae_jax.lm.spec import Spec
from sae_jax.types import UsageError

# In the order a block computes them.
POINTS = (
    *("resid_pre", "attn_in", "attn_z", "attn_raw", "attn_out"),
    *("resid_mid", "mlp_in", "mlp_act", "mlp_raw", "mlp_out", "resid_post"),
)
READ_BY_BLOCK = ("attn_in", "mlp_in")  # copies of the stream: what is there does not join it
# As TransformerLens calls them, in its own words for a block; the width of heads stands apart there, too.
_TRANSFORMER_LENS = {
    "resid_pre": "hook_resid_pre",
    "attn_in": "ln1.hook_normalized",
    "attn_z": "attn.hook_z",
    "attn_out": "hook_attn_out",
    "resid_mid": "hook_resid_mid",
    "mlp_in": "ln2.hook_normalized",
    "mlp_act": "mlp.hook_post",
    "mlp_out": "hook_mlp_out",
    "resid_post": "hook_resid_post",
}


class Hook(NamedTuple):
    """A place in a model. Equal to the plain tuple (layer, point), which works as a key too."""

    layer: int
    point: str

    def __str__(self) -> str:
        return f"{self.point}.{self.layer}"


def points(spec: Spec) -> tuple[str, ...]:
    """The points that a model has, in the order a block computes them."""
    lacks = {"resid_mid"} if spec.parallel else set()
    lacks |= set() if spec.post_norms else {"attn_raw", "mlp_raw"}
    return tuple(point for point in POINTS if point not in lacks)


def parse_hook(text: str, spec: Spec) -> Hook:
    """The hook that `text` ("point.layer") names; UsageError if this model does not have it."""
    point, _, layer = text.rpartition(".")
    if not (layer.isdecimal() and len(layer) < 10):
        raise UsageError(f"hook {text!r} is not point.layer; {_choices(spec)}")
    return check_hook(Hook(int(layer), point), spec)


def check_hook(hook: tuple[int, str], spec: Spec) -> Hook:
    """`hook` as a Hook; UsageError if the model does not have it."""
    hook = Hook(*hook)
    if hook.point not in points(spec) or not 0 <= hook.layer < spec.n_layers:
        raise UsageError(f"hook {str(hook)!r} does not exist; {_choices(spec)}")
    return hook


def hook_width(spec: Spec, hook: tuple[int, str]) -> int:
    """Numbers per token at `hook`, heads flattened: d_model, d_mlp (mlp_act) or n_heads * d_head (attn_z)."""
    widths = {"mlp_act": spec.d_mlp, "attn_z": spec.n_heads * spec.d_head}
    return widths.get(check_hook(hook, spec).point, spec.d_model)


def names_elsewhere(spec: Spec, point: str) -> tuple[str, str]:
    """(name in TransformerLens, module in transformers) of a point, "{layer}" standing for the layer; "" for none.

    A module of transformers has the point as its output, or where it says so as its input.
    """
    theirs = _TRANSFORMER_LENS.get(point, "")
    note = " times the norm's weight" if spec.norm == "rms_norm" and theirs.endswith("hook_normalized") else ""
    return f"blocks.{{layer}}.{theirs}{note}" if theirs else "", family(spec.family).modules[point]


def from_transformer_lens(name: str) -> str | None:
    """The hook, as "point.layer", that TransformerLens calls "blocks.{layer}.{name}"; None if none is the same.

    What it calls normalised lacks the norm's weight in some models, so that is none.
    """
    found = re.fullmatch(r"blocks\.(\d{1,4})\.(.+)", name)
    points_ = [point for point, theirs in _TRANSFORMER_LENS.items() if found and theirs == found[2]]
    return f"{points_[0]}.{int(found[1])}" if found and points_ and points_[0] not in READ_BY_BLOCK else None


def to_transformer_lens(hook: str | None) -> str | None:
    """What TransformerLens calls a hook "point.layer"; None where it has no such point."""
    point, _, layer = (hook or "").rpartition(".")
    return f"blocks.{layer}.{_TRANSFORMER_LENS[point]}" if point in _TRANSFORMER_LENS else None


def _choices(spec: Spec) -> str:
    return f"points of this model are {', '.join(points(spec))}, layers 0 to {spec.n_layers - 1}, as in resid_post.0"
