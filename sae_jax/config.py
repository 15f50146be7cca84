"""Values from YAML files and flags into frozen dataclasses, and back to JSON.

    YAML file --flatten--> ["--sae.k=32", ...] --+
                                                 +--> one tyro parser --> dataclass --> resolved JSON
    flags the user typed ------------------------+

A file and a flag take the same road, so a value is typed and refused alike wherever it came from, and later tokens
win. What differs between the members of a run or of a grid is not said in words again: `replaced` changes settings of a
dataclass. Only mechanism lives here: config classes sit beside the code they configure.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import io
import json
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, TypeVar, get_args, get_origin, get_type_hints

import msgspec
import tyro

from sae_jax import storage
from sae_jax.errors import UsageError, UserError

C = TypeVar("C")

MAX_RECIPE_BYTES = 1 << 20
RETIRED = {"train.tensorboard": "train.log=tensorboard"}  # keys of recipes that earlier versions read


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The mapping in a YAML file. Raises UsageError if it is missing, is not a mapping or repeats a key."""
    try:
        text = storage.read_limited(path, MAX_RECIPE_BYTES).decode("utf-8")
    except UnicodeDecodeError as error:
        raise UsageError(f"{path}: not UTF-8 (byte {error.start}); save it as UTF-8 text") from None
    except UserError as error:
        raise UsageError(str(error)) from None
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}; give the path of a recipe such as configs/demo.yaml") from None
    content = storage.parse_yaml(text, path)
    if not isinstance(content, dict):
        raise UsageError(f"{path}: holds {type(content).__name__}, not `key: value` pairs")
    return content


def flatten(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Nested mapping -> dotted keys: {"sae": {"k": 4}} gives ("sae.k", 4)."""
    for key, value in values.items():
        if isinstance(value, dict):
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def to_tokens(values: dict[str, Any]) -> list[str]:
    """Nested mapping -> the command-line tokens that say the same."""
    tokens: list[str] = []
    for key, value in flatten(values):
        if isinstance(value, bool):
            head, _, leaf = key.rpartition(".")
            tokens.append(f"--{key}" if value else f"--{head + '.' if head else ''}no-{leaf}")
        elif isinstance(value, list | tuple):
            tokens += [f"--{key}", *map(str, value)]
        else:
            tokens.append(f"--{key}={value}")
    return tokens


def known_keys(cls: type, prefix: str = "", instance: Any = None) -> set[str]:
    """Dotted names of all leaf fields of a (nested, possibly parametrised) dataclass, or of an instance of it."""
    keys = set()
    for name, kind in _field_types(cls).items():
        below = None if instance is None else getattr(instance, name)
        kind = type(below) if dataclasses.is_dataclass(below) else kind
        nested = getattr(kind, "__origin__", kind)
        is_nested = dataclasses.is_dataclass(nested)
        keys |= known_keys(kind, f"{prefix}{name}.", below) if is_nested else {prefix + name}
    return keys


def check_keys(values: dict[str, Any], known: set[str], source: str) -> None:
    """Refuse a key that no dataclass has, with the nearest one that exists."""
    for key, _ in flatten(values):
        if key not in known:
            raise UsageError(f"{source}: unknown key {key!r}; {nearest(key, known)}")


def nearest(key: str, known: Collection[str]) -> str:
    """What to say of a key that is none of these."""
    if key in RETIRED:
        return f"use {RETIRED[key]}"
    # Most often the section was left out: `lr` for `train.lr`.
    near = sorted(name for name in known if name.rpartition(".")[2] == key.rpartition(".")[2])
    near = near or difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    return f"did you mean {' or '.join(near)}?" if near else f"there are {', '.join(sorted(known))}"


def parse(
    cls: type[C], tokens: Sequence[str], prog: str, default: C | None = None, description: str | None = None
) -> C:
    """Tokens -> a `cls`, or `default` with what they change of it.

    `--help` prints `description`, or the docstring of `cls`, and the flags, and exits 0. Anything wrong raises
    UsageError in one line.
    """
    _check_flags(tokens, known_keys(cls))
    said = io.StringIO()
    kept: Any = {} if default is None else {"default": default}
    try:
        with contextlib.redirect_stderr(said):
            parsed = tyro.cli(cls, args=list(tokens), prog=prog, description=description, **kept)
    except SystemExit as stop:
        if not stop.code:
            raise
        raise UsageError(_first_paragraph(said.getvalue())) from None
    # No text means anything when empty, and an empty path would be the current directory.
    for key, value in flatten(dataclasses.asdict(parsed)):  # type: ignore[call-overload]
        if value == "":
            raise UsageError(f"{key} is empty; give it a value or leave it out")
    return parsed


def from_dict(cls: type[C], values: Mapping[str, Any], where: str = "config") -> C:
    """The inverse of `to_dict`. Raises UsageError for a key that is unknown or missing, or a value of a wrong type."""
    check_keys(dict(values), known_keys(cls), where)
    try:
        return msgspec.convert(values, cls, strict=False)
    except (msgspec.ValidationError, UsageError) as error:  # of its type, or refused by the dataclass itself
        raise UsageError(f"{where}: {error}") from None


def replaced(config: C, settings: Mapping[str, Any], where: str, prefix: str = "") -> C:
    """A (nested) dataclass with these settings changed, each typed as its field is.

    Args:
        config: a dataclass.
        settings: {dotted key: value}, such as {"sae.k": 16}. A single value stands for a tuple of one, and words for a
            tuple of them.
        where: for messages: what asks for it.
        prefix: for messages: of the keys, where `config` is part of another one.

    Raises:
        UsageError: an unknown key, or a value of a wrong type or out of range.
    """
    known = known_keys(type(config), prefix, config)
    check_keys({prefix + key: None for key in settings}, known, where)
    changes: dict[str, Any] = {}
    nested: dict[str, dict[str, Any]] = {}
    for key, value in settings.items():
        head, _, rest = key.partition(".")
        if rest:
            nested.setdefault(head, {})[rest] = value
        else:
            changes[head] = _converted(value, _field_types(type(config))[head], f"{where}: {prefix}{key}")
    for head, below in nested.items():
        changes[head] = replaced(getattr(config, head), below, where, f"{prefix}{head}.")
    try:
        return dataclasses.replace(config, **changes)  # type: ignore[type-var]
    except UsageError as error:
        raise UsageError(f"{where}: {error}") from None


def to_dict(config: Any) -> dict[str, Any]:
    """A resolved config as plain nested values, ready for JSON."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def share(text: str) -> tuple[int, int]:
    """(i, n) of a --shard=i/n: the i-th of n shares of some work. Raises UsageError."""
    match = re.fullmatch(r"(\d{1,9})/(\d{1,9})", text)
    if not match or not int(match[1]) < int(match[2]):
        raise UsageError(f"--shard={text!r} must be i/n with 0 <= i < n, such as 0/4")
    return int(match[1]), int(match[2])


def _field_types(cls: Any) -> dict[str, Any]:
    origin = getattr(cls, "__origin__", cls)
    bound = dict(zip(getattr(origin, "__parameters__", ()), getattr(cls, "__args__", ()), strict=False))
    hints = get_type_hints(origin).items()
    return {name: bound.get(kind, kind) for name, kind in hints if get_origin(kind) is not ClassVar}


def _converted(value: Any, kind: Any, where: str) -> Any:
    is_tuple = get_origin(kind) is tuple or any(get_origin(part) is tuple for part in get_args(kind))
    if is_tuple and not isinstance(value, list | tuple):
        value = value.split() if isinstance(value, str) else [value]
    try:
        return msgspec.convert(_plain(value), kind, strict=False)
    except (msgspec.ValidationError, UnicodeEncodeError) as error:  # of bytes on a command line that are no text
        raise UsageError(f"{where}={value!r}: {error}") from None


def _plain(value: Any) -> Any:
    """A number of numpy or JAX as one of Python."""
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    return value.item() if hasattr(value, "dtype") and getattr(value, "size", 0) == 1 else value


def _check_flags(tokens: Sequence[str], known: set[str]) -> None:
    for token in tokens:
        if not token.startswith("--") or token in ("--help", "--"):
            continue
        key = token[2:].partition("=")[0].replace("-", "_")
        head, _, leaf = key.rpartition(".")
        positive = (f"{head}." if head else "") + leaf.removeprefix("no_")
        if key not in known and positive not in known:
            check_keys({key: None}, known, f"flag {token.partition('=')[0]}")


def _first_paragraph(box: str) -> str:
    """The first message of one of tyro's boxes, as one line."""
    lines = []
    for line in box.splitlines()[1:]:
        text = line.strip("│| ")
        if set(text) - set("─╰╯-+"):
            lines.append(text)
        elif lines:  # what comes below it is the same for all
            break
    return " ".join(lines) or box.strip()
