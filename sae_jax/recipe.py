"""Recipes: one YAML file says how to harvest, what to train and on which mesh; each command takes its part.

    harvest:  {...}   HarvestConfig          site: resid_post.2       the source to encode, or a list of them
    d_model:  768     width of each source,  reconstruct: mlp_out.2   another source, or a list; none: what is encoded
                      for plans; checked against the set
    sae:      {...}   the variant's Config   train: {...}             TrainConfig
    mesh:     {...}   MeshConfig             engine: {...}            EngineConfig
    members:  [{name: k16, sae: {k: 16}, train: {lr: 1e-3}}, ...]     several SAEs at once: what each has of its own
    sweep:    {grid: {sae.k: [16, 32]}, ...}                          SweepConfig

The whole file is checked whichever command reads it, so a misspelt key is found at the first one; what members have of
their own is looked at by the command that trains them.
"""

from __future__ import annotations

import dataclasses
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from sae_jax import config
from sae_jax.activations.harvest import HarvestConfig
from sae_jax.mesh import MeshConfig
from sae_jax.ops.tuning import EngineConfig
from sae_jax.progress import console
from sae_jax.saes import base
from sae_jax.sweeps.grid import SweepConfig, as_words
from sae_jax.training.settings import SHARED, TrainConfig
from sae_jax.types import UsageError

S = TypeVar("S")
C = TypeVar("C")

DEFAULT_VARIANT = "topk"
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")  # of a member: a folder, and part of names in a checkpoint


@dataclass(frozen=True)
class Recipe(Generic[S]):
    """Everything a recipe file may say."""

    sae: S
    site: tuple[str, ...] = ()
    reconstruct: tuple[str, ...] = ()
    d_model: int | None = None
    harvest: HarvestConfig = field(default_factory=HarvestConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    members: tuple[str, ...] = ()
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
    for path, content in zip(files, contents, strict=True):
        _check_sections(path, content)
        if "members" in content:
            content["members"] = _as_flags(path, content["members"])
        if grid := content.get("sweep", {}).get("grid"):
            if not isinstance(grid, dict):
                raise UsageError(f"{path}: sweep.grid is {grid!r}; give it `setting: [values]` pairs")
            content["sweep"] = {**content["sweep"], "grid": as_words(dict(config.flatten(grid)))}
    variant = _typed_variant(flags) or next(
        (v for c in reversed(contents) if (v := c.get("sae", {}).get("variant"))), DEFAULT_VARIANT
    )
    own: Any = base.config_class(variant)
    recipe: Any = Recipe[own]
    parsed = command[own] if getattr(command, "__parameters__", ()) else command
    wanted = {f.name for f in dataclasses.fields(command)} & {f.name for f in dataclasses.fields(Recipe)}
    tokens: list[str] = []
    for path, content in zip(files, contents, strict=True):
        content = _for_variant(path, content, variant)
        config.check_keys(content, config.known_keys(recipe), path)
        try:
            config.parse(recipe, config.to_tokens(content), prog)
        except UsageError as error:
            raise UsageError(f"{path}: {error}") from None
        tokens += config.to_tokens({key: value for key, value in content.items() if key in wanted})
    return config.parse(parsed, [*tokens, *flags], prog)


def parse_members(command: Any, argv: Sequence[str], prog: str) -> dict[str, Any]:
    """{name: the command of that member}, or {"": the command} where `members` lists none.

    A member is the same command line with its own flags after it, so its values are typed and refused like all others.

    Raises:
        UsageError: as `parse`, the member named; or a member that differs in what members share.
    """
    together = parse(command, argv, prog)
    found = {}
    for name, flags in member_flags(together.members).items():
        found[name] = parse_member(command, argv, prog, name, flags, together)
    return found or {"": together}


def member_flags(members: Sequence[str]) -> dict[str, list[str]]:
    """{name: flags} of what `members` lists. Raises UsageError for a name that is none, or that two have."""
    found: dict[str, list[str]] = {}
    for words in members:
        name, *flags = _split(words)
        if not NAME.fullmatch(name) or name in found:
            raise UsageError(
                f"member {name!r}: every member needs a name of its own, of letters, digits, '.', '_' and '-'"
            )
        found[name] = flags
    return found


def parse_member(command: Any, argv: Sequence[str], prog: str, name: str, flags: Sequence[str], together: Any) -> Any:
    """The command line `argv` with a member's own flags after it, on the batches of all."""
    try:
        member = parse(command, [*argv, *flags], prog)
    except UsageError as error:
        raise UsageError(f"member {name}: {error}") from None
    return _with_shared(name, member, together)


def _with_shared(name: str, member: Any, together: Any) -> Any:
    """The member, on the batches of all. Refuses one that differs in more than `sae` and settings of its own."""
    expected = dict(config.flatten(config.to_dict(together)))
    for key, value in config.flatten(config.to_dict(member)):
        own = key.startswith("sae.") or (key.startswith("train.") and key.removeprefix("train.") not in SHARED)
        if not own and expected[key] != value:
            raise UsageError(
                f"member {name}: {key}={value}, but members share one pass over the data; give it to all, as {key}"
            )
    return dataclasses.replace(member, train=dataclasses.replace(member.train, order_seed=together.train.order))


def _as_flags(path: str, members: Any) -> list[str]:
    """Members as a recipe lists them, each as the words that `--members` takes for it."""
    if not isinstance(members, list) or not all(isinstance(member, dict) for member in members):
        raise UsageError(f"{path}: members is {members!r}; give a list of {{name: ..., sae: {{...}}, train: {{...}}}}")
    words = []
    for member in members:
        own = {key: value for key, value in member.items() if key != "name"}
        for key, section in own.items():
            if key not in ("sae", "train") or not isinstance(section, dict):
                raise UsageError(f"{path}: members: {key}: {section!r} is not a section; there are name, sae and train")
        words.append(shlex.join([str(member.get("name", "")), *config.to_tokens(own)]))
    return words


def _split(words: str) -> list[str]:
    try:
        return shlex.split(words) or [""]
    except ValueError as error:
        raise UsageError(f"--members {words!r}: {error}") from None


def _check_sections(path: str, content: dict[str, Any]) -> None:
    for name in ("harvest", "sae", "train", "mesh", "engine", "sweep"):
        section = content.get(name, {})
        if not isinstance(section, dict):
            raise UsageError(f"{path}: {name} is {section!r}; give it `key: value` pairs or leave it out")
        if not isinstance(section.get("variant", ""), str):
            raise UsageError(f"{path}: {name}.variant is {section['variant']!r}; give a name such as {DEFAULT_VARIANT}")


def _typed_variant(flags: list[str]) -> str | None:
    """The last --sae.variant among the flags, in either spelling."""
    found = None
    for i, token in enumerate(flags):
        if token.startswith("--sae.variant="):
            found = token.partition("=")[2]
        elif token == "--sae.variant" and i + 1 < len(flags):
            found = flags[i + 1]
    return found


def _for_variant(path: str, content: dict[str, Any], variant: str) -> dict[str, Any]:
    """The file's content where a flag changed the variant: `sae` keys that the new one lacks go, with a notice."""
    sae = content.get("sae")
    if not isinstance(sae, dict) or sae.get("variant", variant) == variant:
        return content
    own = config.known_keys(base.config_class(str(sae["variant"])))
    known = config.known_keys(base.config_class(variant))
    dropped = [key for key in sae if key in own - known]
    if dropped:
        console.print(f"{path}: {variant} has no {', '.join(dropped)}; left out")
    return {**content, "sae": {**{k: v for k, v in sae.items() if k not in dropped}, "variant": variant}}
