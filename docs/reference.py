"""Writes cli.md, api.md and formulas.md from the code: `make reference`. A test fails while they are not what it says.

cli.md        the dataclass that each command hands to its parser: flags, defaults, docstrings of fields
api.md        what `sae_jax` exports: signatures and docstrings
formulas.md   the heads of sae_jax/saes/*.py, which state formulas, sources and deviations
"""

from __future__ import annotations

import ast
import dataclasses
import importlib
import inspect
import keyword
import re
import textwrap
from collections.abc import Iterator
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints
from unittest import mock

import sae_jax
from sae_jax import config, recipe
from sae_jax.commands.usage import COMMANDS
from sae_jax.saes import base

HERE = Path(__file__).parent
FOOTER = "\n<!-- Written by docs/reference.py from the code: `make reference`. -->\n"


CLI = """\
# Commands

`sae-jax COMMAND [RECIPE.yaml ...] [--key=value ...]`. Flags win over recipes, later recipes over earlier ones. In
a recipe `--train.batch-size=64` is `train: {batch_size: 64}`; on the command line `_` and `-` are the same. A flag
that takes several values is followed by them, as in `--site resid_post.1 mlp_out.1`. `sae-jax COMMAND --help` says
the same, and [devices](devices.md#exit-codes) what exit codes mean.
"""

API = """\
# Python: every name

What `import sae_jax` gives. [From Python](python.md) shows how the parts go together; settings that a function
takes as keywords are the fields in [Commands](cli.md), by their last name: `--train.batch-size` is `batch_size=`.
"""

FORMULAS = """\
# Formulas

What each variant computes, where it comes from, and where it is another: the heads of the files in
[sae_jax/saes](../sae_jax/saes), each of which has an oracle in float64 in [tests/oracles](../tests/oracles), written
from the paper, that the tests hold it to. [Variants](variants.md) is about choosing and using them.

Throughout, x is a row of a source, such as the residual stream, d numbers; z its code, n_latents numbers of which
few are not 0; x_hat the reconstruction; sg stops the gradient. A latent is a row of W_enc and of W_dec.
"""


SAE = """\
## Settings of sae

Each variant has its own. [Variants](variants.md) says what they are for, [formulas](formulas.md) what they compute.
"""


class Command(BaseException):
    """What a command hands to its parser: raised in the place of parsing, before the command does anything."""

    def __init__(self, parser: str, cls: Any):
        self.parser, self.cls = parser, cls


def command(name: str, *argv: str) -> Command:
    """The dataclass of a command, and whether recipes are read."""

    def stop(parser: str) -> Any:
        def parse(cls: Any, *_: Any, **__: Any) -> None:
            raise Command(parser, cls)

        return parse

    module = importlib.import_module(f"sae_jax.commands.{name}{'_' * keyword.iskeyword(name)}")
    with mock.patch.object(config, "parse", stop("flags")), mock.patch.object(recipe, "parse", stop("recipe")):
        try:
            module.run(list(argv))
        except Command as found:
            return found
    raise AssertionError(f"{name} parses nothing")


def parsed(argv: list[str]) -> Any:
    """What a command line says, recipes and flags, without running it. Raises UsageError for what it cannot say."""
    name, *words = argv
    asked = command(name, *words)
    words = [word for word in words if word != "--harvest"] if name == "plan" else words
    return (recipe if asked.parser == "recipe" else config).parse(asked.cls, words, f"sae-jax {name}")


def field_docs(cls: type) -> dict[str, str]:
    """{field: the string below it}, those of base classes too."""
    docs: dict[str, str] = {}
    for owner in reversed(cls.__mro__):
        if not dataclasses.is_dataclass(owner):
            continue
        (definition,) = ast.parse(textwrap.dedent(inspect.getsource(owner))).body
        assert isinstance(definition, ast.ClassDef)
        for line, after in zip(definition.body, definition.body[1:], strict=False):
            if isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name):
                is_doc = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
                text = str(after.value.value) if is_doc else ""  # type: ignore[union-attr]
                docs[line.target.id] = " ".join(text.split())
    return docs


def values_of(kind: Any) -> str:
    """What may be given for a field, in words."""
    origin, parts = get_origin(kind), get_args(kind)
    if origin is Literal:
        return " ".join(f"`{part}`" for part in parts)
    if origin in (Union, UnionType):
        return ", or ".join(values_of(part) for part in parts if part is not type(None))
    if origin is tuple:
        return values_of(parts[0]) + ", several"
    return {str: "text", int: "whole number", float: "number", bool: "switch"}.get(kind, getattr(kind, "__name__", ""))


def default_of(field: dataclasses.Field[Any]) -> str:
    """A default as it is typed."""
    if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
        return "**needed**"
    value = field.default if field.default is not dataclasses.MISSING else field.default_factory()  # type: ignore[misc]
    if value is None or value == ():
        return ""
    if isinstance(value, bool):
        return "on" if value else "off"
    return f"`{' '.join(map(str, value)) if isinstance(value, tuple) else value}`"


def cell(text: str) -> str:
    """As the cell of a table."""
    return escape(text).replace("|", "\\|")


def escape(text: str) -> str:
    """Plain text in which Markdown sees no mark-up, but for what stands between backticks."""
    parts = re.split(r"(`[^`]*`)", text)
    return "".join(part if i % 2 else re.sub(r"([*<\[\]])", r"\\\1", part) for i, part in enumerate(parts))


def table(cls: type, prefix: str = "") -> Iterator[str]:
    """The rows of a dataclass's own fields, without its sections."""
    hints, docs = get_type_hints(cls), field_docs(cls)
    for field in dataclasses.fields(cls):
        kind = hints[field.name]
        if dataclasses.is_dataclass(kind) or isinstance(kind, TypeVar):
            continue
        flag = f"--{prefix}{field.name.replace('_', '-')}"
        if is_positional(cls, field.name):
            flag = field.name.upper()
        elif kind is bool:
            flag = f"{flag}`, `--{prefix}no-{field.name.replace('_', '-')}"
        yield f"| `{flag}` | {values_of(kind)} | {default_of(field)} | {cell(docs.get(field.name, ''))} |"


def is_positional(cls: type, name: str) -> bool:
    """Whether a field is given without its name."""
    return get_origin(get_type_hints(cls, include_extras=True)[name]) is Annotated  # tyro.conf.Positional


def first_line(what: Any) -> str:
    """Of its docstring."""
    return escape((inspect.getdoc(what) or "").partition("\n")[0])


def sections(cls: type) -> dict[str, type | None]:
    """{field: its dataclass} of nested ones; None for the variant's."""
    kinds = {name: None if isinstance(kind, TypeVar) else kind for name, kind in get_type_hints(cls).items()}
    names = [field.name for field in dataclasses.fields(cls)]
    return {n: kinds[n] for n in names if kinds[n] is None or dataclasses.is_dataclass(kinds[n])}


HEAD = ["", "| flag | value | default | |", "|---|---|---|---|"]


def cli() -> str:
    """One section a command, then the sections that commands share, then the settings of variants."""
    lines = [*CLI.splitlines(), "", *(f"- [{name}](#{name}): {escape(what)}" for name, what in COMMANDS.items())]
    shared: dict[str, type] = {}
    for name, what in COMMANDS.items():
        lines += ["", f"## {name}", "", f"{escape(what[0].upper() + what[1:])}."]
        for word in ("", " --harvest") if name == "plan" else ("",):
            lines += form(name, word, shared)
    for key, kind in shared.items():
        lines += ["", f"## Settings of {key}", "", first_line(kind), *HEAD, *table(kind, f"{key}.")]
    lines += ["", *SAE.splitlines()]
    for variant in base.variants():
        kind = base.config_class(variant)
        lines += ["", f"### {variant}", "", first_line(kind), *HEAD, *table(kind, "sae.")]
    return "\n".join(lines) + "\n"


def form(name: str, word: str, shared: dict[str, type]) -> Iterator[str]:
    """One form of a command. Sections that commands have in common are added to `shared`."""
    found = command(name, *word.split())
    cls = getattr(found.cls, "__origin__", found.cls)
    reads = " [RECIPE.yaml ...]" if found.parser == "recipe" else ""
    places = "".join(f" {field.name.upper()}" for field in dataclasses.fields(cls) if is_positional(cls, field.name))
    yield from ("", f"    sae-jax {name}{reads}{places}{word} [--key=value ...]")
    if rows := list(table(cls)):
        yield from (*HEAD, *rows)
    links = []
    for key, kind in sections(cls).items():
        assert kind is None or shared.setdefault(key, kind) is kind, f"{name} has another {key} than the others"
        links.append(f"[`--{key}.*`](#settings-of-{key})")
    if links:
        yield from ("", f"And {', '.join(links)}.")


def api() -> str:
    """A section for each name that the package exports."""
    lines = API.splitlines()
    for name in sae_jax.__all__:
        what = getattr(sae_jax, name)
        lines += ["", f"## {name}", ""]
        if inspect.isclass(what):
            lines += [*documented(what)]
            for method, function in public_methods(what):
                lines += [f"- `{method}{signature(function)}`: {first_line(function)}"]
        else:
            lines += [*code(f"{name}{signature(what, broken=True)}"), "", *documented(what)]
    return "\n".join(lines) + "\n"


def documented(what: Any) -> list[str]:
    """A docstring: its first line as text, the rest as it stands."""
    first, _, rest = (inspect.getdoc(what) or "").partition("\n")
    return [escape(first), "", *(code(rest.strip("\n")) if rest.strip() else []), *([""] if rest.strip() else [])]


def public_methods(cls: type) -> list[tuple[str, Any]]:
    """Methods and properties of a class and of its bases in the package, in order of name."""
    found = {}
    for owner in reversed(cls.__mro__):
        if owner.__module__.startswith("sae_jax"):
            found |= {k: v for k, v in vars(owner).items() if k[0] != "_" and _is_ours(v)}
    return sorted(found.items())


def _is_ours(value: Any) -> bool:
    return inspect.isfunction(value) and value.__module__.startswith("sae_jax")


def signature(function: Any, broken: bool = False) -> str:
    """As in the source; one argument a line if it is long."""
    text = str(inspect.signature(function))
    text = text.replace("'", "").replace("(self, ", "(").replace("(self)", "()")
    if not broken or len(text) < 90:
        return text
    parts = [str(p).replace("'", "") for p in inspect.signature(function).parameters.values()]
    kinds = [p.kind for p in inspect.signature(function).parameters.values()]
    if inspect.Parameter.KEYWORD_ONLY in kinds and inspect.Parameter.VAR_POSITIONAL not in kinds:
        parts.insert(kinds.index(inspect.Parameter.KEYWORD_ONLY), "*")
    returns = text.rpartition(") -> ")[2] if ") -> " in text else ""
    return "(\n" + "".join(f"    {part},\n" for part in parts) + ")" + (f" -> {returns}" if returns else "")


def code(text: str) -> list[str]:
    """As an indented block."""
    return textwrap.indent(text, "    ").splitlines()


def formulas() -> str:
    """The head of each file of variants, and of those that they share."""
    lines = FORMULAS.splitlines()
    for name in (*base.variants(), "normalise", "losses", "penalty"):
        text = inspect.getdoc(importlib.import_module(f"sae_jax.saes.{name}")) or ""
        first, _, rest = text.partition("\n")
        body = "\n".join(line if line.startswith("    ") else escape(line) for line in rest.splitlines())
        lines += ["", f"## {name}", "", escape(first), body]
    return "\n".join(lines) + "\n"


PAGES = {"cli.md": cli, "api.md": api, "formulas.md": formulas}


if __name__ == "__main__":
    for name, page in PAGES.items():
        (HERE / name).write_text(page() + FOOTER)
