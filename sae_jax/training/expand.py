"""The members of a run, or of a grid, from what each changes: by `dataclasses.replace`, typed as fields are."""

from __future__ import annotations

import dataclasses
import re
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from sae_jax import config
from sae_jax.progress import console
from sae_jax.saes import base
from sae_jax.saes.base import SaeConfig
from sae_jax.training.settings import SHARED
from sae_jax.types import UsageError

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")  # of a member: a folder, and part of names in a checkpoint


def expand_members(job: Any) -> dict[str, Any]:
    """{name: the job of that member}, or {"": job} where `members` lists none.

    Raises:
        UsageError: a name that is none or that two have, a setting that is refused, or one that members share.
    """
    members: dict[str, Any] = {}
    for member in job.members:
        is_typed = isinstance(member, str)  # 'k8 --sae.k=8'
        name, *rest = _split(member) if is_typed else member
        if not NAME.fullmatch(name) or name in members:
            raise UsageError(
                f"member {name!r}: every member needs a name of its own, of letters, digits, '.', '_' and '-'"
            )
        changed = change_by_flags(name, job, rest) if is_typed else change(f"member {name}", job, member[1])
        members[name] = with_shared(name, changed, job)
    return members or {"": job}


def change(what: str, job: Any, settings: Mapping[str, Any]) -> Any:
    """A job with these settings changed, {dotted key: value}; what it says in messages is `what`."""
    if (variant := settings.get("sae.variant")) is not None:
        job = dataclasses.replace(job, sae=with_variant(what, job.sae, str(variant)))
        settings = {key: value for key, value in settings.items() if key != "sae.variant"}
    return config.replaced(job, settings, what)


def change_by_flags(name: str, job: Any, flags: Sequence[str]) -> Any:
    """A job changed by flags as users type them."""
    if (variant := typed_variant(flags)) is not None:
        job = dataclasses.replace(job, sae=with_variant(f"member {name}", job.sae, variant))
    generic: Any = type(job)
    cls = generic[type(job.sae)]
    # What the parser has no words for stays out of it, and comes back afterwards.
    aside = {"members": job.members} | ({"sweep": job.sweep} if hasattr(job, "sweep") else {})
    shown = dataclasses.replace(job, **{n: type(value)() for n, value in aside.items()})
    try:
        return dataclasses.replace(config.parse(cls, flags, "members", default=shown), **aside)
    except UsageError as error:
        raise UsageError(f"member {name}: {error}") from None


def with_variant(what: str, sae: SaeConfig, variant: str) -> SaeConfig:
    """The config of another variant, with the settings of `sae` that it knows; says which it leaves out or changes."""
    cls = base.config_class(variant)
    if isinstance(sae, cls):
        return sae
    known = {f.name: f.default for f in dataclasses.fields(cls)}
    defaults = {f.name: f.default for f in dataclasses.fields(sae)}
    values = {name: getattr(sae, name) for name in defaults if name != "variant"}
    given = {name: value for name, value in values.items() if value != defaults[name]}
    if dropped := [name for name in given if name not in known]:
        console.print(f"{what}: {variant} has no {', '.join(dropped)}; left out")
    changed = [f"{n}={known[n]}" for n in values if n in known and n not in given and known[n] != values[n]]
    if changed:
        console.print(f"{what}: {variant} has defaults of its own: {', '.join(changed)}")
    return cls(**{name: value for name, value in given.items() if name in known})


def with_shared(name: str, member: Any, job: Any) -> Any:
    """The member, on the batches of all. Refuses one that differs in more than `sae` and settings of its own."""
    together = dict(config.flatten(config.to_dict(job)))
    for key, value in config.flatten(config.to_dict(member)):
        may_differ = key.startswith("sae.") or (key.startswith("train.") and key.removeprefix("train.") not in SHARED)
        if not may_differ and together[key] != value:
            raise UsageError(
                f"member {name}: {key}={value}, but members share one pass over the data; give it to all, as {key}"
            )
    return dataclasses.replace(member, train=dataclasses.replace(member.train, order_seed=job.train.order))


def typed_variant(flags: Sequence[str]) -> str | None:
    """The last --sae.variant among the flags, in either spelling."""
    variant = None
    for i, token in enumerate(flags):
        if token.startswith("--sae.variant="):
            variant = token.partition("=")[2]
        elif token == "--sae.variant" and i + 1 < len(flags):
            variant = flags[i + 1]
    return variant


def _split(words: str) -> list[str]:
    try:
        return shlex.split(words) or [""]
    except ValueError as error:
        raise UsageError(f"--members {words!r}: {error}") from None
