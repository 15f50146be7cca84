"""Recipes: one YAML file says how to harvest, what to train and on which mesh; each command takes its part.

    harvest:  {...}   HarvestConfig          site: resid_post.2       the source to encode, or a list of them
    d_model:  768     width of each source,  reconstruct: mlp_out.2   another source, or a list; none: what is encoded
                      for plans; checked against the set
    sae:      {...}   the variant's Config   train: {...}             TrainConfig
    mesh:     {...}   MeshConfig             engine: {...}            EngineConfig
    live:     {...}   LiveConfig, for `train --data live`
    members:  [{name: k16, sae: {k: 16}, train: {lr: 1e-3}}, ...]     several SAEs at once: what each changes
    sweep:    {grid: {sae.k: [16, 32]}, ...}                          SweepConfig

The whole file is checked whichever command reads it, so a misspelt key is found at the first one.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from sae_jax import config
from sae_jax.activations.live import LiveConfig
from sae_jax.activations.settings import HarvestConfig
from sae_jax.mesh import MeshConfig
from sae_jax.ops.tuning import EngineConfig
from sae_jax.progress import console
from sae_jax.saes import base
from sae_jax.sweeps.grid import SweepConfig
from sae_jax.training.expand import typed_variant
from sae_jax.training.settings import TrainConfig
from sae_jax.types import UsageError

S = TypeVar("S")

DEFAULT_VARIANT = "topk"


@dataclass(frozen=True)
class Recipe(Generic[S]):
    """Everything a recipe file may say, but for `members` and `sweep.grid`, which are read apart."""

    sae: S
    site: tuple[str, ...] = ()
    reconstruct: tuple[str, ...] = ()
    d_model: int | None = None
    harvest: HarvestConfig = field(default_factory=HarvestConfig)
    live: LiveConfig = field(default_factory=LiveConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    sweep: SweepConfig = field(default_factory=SweepConfig)


def parse(command: Any, argv: Sequence[str], prog: str) -> Any:
    """A command's dataclass from recipe files (leading arguments) and flags; flags win, later files win.

    Args:
        command: a dataclass; if it is generic its parameter is the variant's config.
        argv: `[RECIPE.yaml ...] [--key=value ...]`.
        prog: for the help text.

    Raises:
        UsageError: one line that names the file or flag, the key or value, and what is allowed.
    """
    n_files = next((i for i, token in enumerate(argv) if token.startswith("-")), len(argv))
    files, flags = argv[:n_files], list(argv[n_files:])
    contents = [config.read_yaml(path) for path in files]
    members, grid = None, None
    for path, content in zip(files, contents, strict=True):
        _check_sections(path, content)
        members = content.pop("members", members)
        grid = content.get("sweep", {}).pop("grid", grid)
    variant = typed_variant(flags) or next(
        (v for c in reversed(contents) if (v := c.get("sae", {}).get("variant"))), DEFAULT_VARIANT
    )
    sae_config: Any = base.config_class(variant)
    recipe: Any = Recipe[sae_config]
    parsed, description = command, None
    if getattr(command, "__parameters__", ()):
        parsed = command[sae_config]
        others = ", ".join(name for name in base.variants() if name != variant)
        description = f"Settings of {variant}. Other variants: {others}; `--sae.variant=NAME --help` lists theirs."
    used = {f.name for f in dataclasses.fields(command)} & {f.name for f in dataclasses.fields(Recipe)}
    tokens: list[str] = []
    for path, content in zip(files, contents, strict=True):
        content = _for_variant(path, content, variant)
        config.check_keys(content, config.known_keys(recipe), path)
        try:
            config.parse(recipe, config.to_tokens(content), prog)
        except UsageError as error:
            raise UsageError(f"{path}: {error}") from None
        tokens += config.to_tokens({key: value for key, value in content.items() if key in used})
    job = config.parse(parsed, [*tokens, *flags], f"{prog} [RECIPE.yaml ...]", description=description)
    if members and hasattr(job, "members") and not job.members:
        job = dataclasses.replace(job, members=tuple(_as_member(files, member) for member in _as_list(files, members)))
    if grid and hasattr(job, "sweep") and not job.sweep.grid:
        job = dataclasses.replace(job, sweep=dataclasses.replace(job.sweep, grid=_as_grid(files, grid)))
    return job


def says(section: str, argv: Sequence[str]) -> bool:
    """Whether recipe files or flags say anything of a section."""
    files = itertools.takewhile(lambda token: not token.startswith("-"), argv)
    is_flag = f"--{section}."
    return any(token.startswith(is_flag) for token in argv) or any(section in config.read_yaml(path) for path in files)


def _as_list(files: Sequence[str], members: Any) -> list[dict[str, Any]]:
    if not isinstance(members, list) or not all(isinstance(member, dict) for member in members):
        where = ", ".join(files)
        raise UsageError(f"{where}: members is {members!r}; give a list of {{name: ..., sae: {{...}}, train: {{...}}}}")
    return members


def _as_member(files: Sequence[str], member: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """(name, settings) of a member as a recipe lists it."""
    sections = {key: value for key, value in member.items() if key != "name"}
    for key, section in sections.items():
        if key not in ("sae", "train") or not isinstance(section, dict):
            where = ", ".join(files)
            raise UsageError(f"{where}: members: {key}: {section!r} is not a section; there are name, sae and train")
    name = member.get("name", "")
    if isinstance(name, bool) or not isinstance(name, str | int):  # `no`, 1e3 and the like, which would be renamed
        raise UsageError(f"{', '.join(files)}: members: name: {name!r} is no text; write it in quotes")
    return str(name), dict(config.flatten(sections))


def _as_grid(files: Sequence[str], grid: Any) -> dict[str, list[Any]]:
    if not isinstance(grid, dict):
        raise UsageError(f"{', '.join(files)}: sweep.grid is {grid!r}; give it `setting: [values]` pairs")
    return {key: value if isinstance(value, list) else [value] for key, value in config.flatten(grid)}


def _check_sections(path: str, content: dict[str, Any]) -> None:
    for name in ("harvest", "live", "sae", "train", "mesh", "engine", "sweep"):
        section = content.get(name, {})
        if not isinstance(section, dict):
            raise UsageError(f"{path}: {name} is {section!r}; give it `key: value` pairs or leave it out")
        if not isinstance(section.get("variant", ""), str):
            raise UsageError(f"{path}: {name}.variant is {section['variant']!r}; give a name such as {DEFAULT_VARIANT}")


def _for_variant(path: str, content: dict[str, Any], variant: str) -> dict[str, Any]:
    """The file's content where a flag changed the variant: `sae` keys that the new one lacks go, with a notice."""
    sae = content.get("sae")
    if not isinstance(sae, dict) or sae.get("variant", variant) == variant:
        return content
    keys_of_file = config.known_keys(base.config_class(str(sae["variant"])))
    known = config.known_keys(base.config_class(variant))
    dropped = [key for key in sae if key in keys_of_file - known]
    if dropped:
        console.print(f"{path}: {variant} has no {', '.join(dropped)}; left out")
    return {**content, "sae": {**{k: v for k, v in sae.items() if k not in dropped}, "variant": variant}}
