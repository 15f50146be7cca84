"""Hooks: the places of a model where activations can be read and changed, a layer and a point inside its block.

With x the residual stream, a block computes

    resid_pre = x                         attn_z    = softmax(q k' / sqrt(d)) v, per head
    attn_out  = attn_z W_o + b_o          resid_mid = resid_pre + attn_out
    mlp_act   = act(norm(resid_mid) W_up + b_up)
    mlp_out   = mlp_act W_down + b_down   resid_post = resid_mid + mlp_out

A hook is written `point.layer`, as in `resid_post.2`; layers count from 0.
"""

from __future__ import annotations

from typing import NamedTuple

from sae_jax.lm.spec import Spec
from sae_jax.types import UsageError

# In the order a block computes them.
POINTS = ("resid_pre", "attn_z", "attn_out", "resid_mid", "mlp_act", "mlp_out", "resid_post")


class Hook(NamedTuple):
    """A place in a model. Equal to the plain tuple (layer, point), which works as a key too."""

    layer: int
    point: str

    def __str__(self) -> str:
        return f"{self.point}.{self.layer}"


def parse_hook(text: str, spec: Spec) -> Hook:
    """The hook that `text` ("point.layer") names; UsageError if this model does not have it."""
    point, _, layer = text.rpartition(".")
    if not (layer.isdecimal() and len(layer) < 10):
        raise UsageError(f"hook {text!r} is not point.layer; {_choices(spec)}")
    return check_hook(Hook(int(layer), point), spec)


def check_hook(hook: tuple[int, str], spec: Spec) -> Hook:
    """`hook` as a Hook; UsageError if the model does not have it."""
    hook = Hook(*hook)
    if hook.point not in POINTS or not 0 <= hook.layer < spec.n_layers:
        raise UsageError(f"hook {str(hook)!r} does not exist; {_choices(spec)}")
    return hook


def hook_width(spec: Spec, hook: tuple[int, str]) -> int:
    """Numbers per token at `hook`, heads flattened: d_model, d_mlp (mlp_act) or n_heads * d_head (attn_z)."""
    widths = {"mlp_act": spec.d_mlp, "attn_z": spec.n_heads * spec.d_head}
    return widths.get(check_hook(hook, spec).point, spec.d_model)


def _choices(spec: Spec) -> str:
    return f"points are {', '.join(POINTS)}, layers 0 to {spec.n_layers - 1}, as in resid_post.0"
