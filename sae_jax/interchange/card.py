"""The README.md of a published dictionary: what people search for, what it is and how good, and how to load it."""

from __future__ import annotations

import re
from typing import NamedTuple

import yaml

from sae_jax.record import Record, SourceRecord
from sae_jax.saes import base

TAGS = ("sparse-autoencoder", "sae", "interpretability", "mechanistic-interpretability", "sae_jax")
_MODEL = re.compile(r"(\w[\w.-]*/\w[\w.-]*)(@[\w./-]+)?")  # of the hub
_METRICS = {
    "fvu": "fraction of variance unexplained (FVU)",
    "l0": "active latents a token (L0)",
    "loss_recovered": "loss recovered, of the language model's; 0: the mean activation in their place",
    "dead_fraction": "dead latents",
}


class Library(NamedTuple):
    """Under which name people filter for a library's dictionaries, and how it loads one."""

    name: str
    code: str  # with {repo}, {folder}, {where} (both) and {model}


_SNAPSHOT = 'from huggingface_hub import snapshot_download\n\nfolder = snapshot_download("{repo}") + "/{folder}"\n'
LIBRARIES = {
    "saelens": Library("saelens", f"{_SNAPSHOT}from sae_lens import SAE\n\nsae = SAE.load_from_disk(folder)"),
    "sparsify": Library(
        "sparsify", f"{_SNAPSHOT}from sparsify import SparseCoder\n\nsae = SparseCoder.load_from_disk(folder)"
    ),
    "dictionary_learning": Library(
        "dictionary_learning",
        f"{_SNAPSHOT}from dictionary_learning.utils import load_dictionary\n\n"
        'ae, config = load_dictionary(folder, device="cpu")',
    ),
    "circuit_tracer": Library(
        "circuit-tracer",
        'from circuit_tracer import ReplacementModel\n\nmodel = ReplacementModel.from_pretrained("{model}", "{where}")',
    ),
}
LIBRARIES["saelens_and_sparsify"] = LIBRARIES["saelens"]


def write(record: Record, repo: str, folder: str, layout: str, licence: str | None) -> str:
    """The text of the card.

    Args:
        record: of the dictionary; metrics that nobody has measured are left out.
        repo: owner/name.
        folder: in the repository; "": all of it.
        layout: the format of the files.
        licence: as the hub names it, such as apache-2.0; None: none is stated.
    """
    library = LIBRARIES.get(layout)
    front = {"library_name": library.name if library else "sae_jax", "tags": _tags(record, library)}
    models = [source.model for source in record.encodes + record.reconstructs if source.model]
    hub_models = [*dict.fromkeys(match[1] for model in models if (match := _MODEL.fullmatch(model)))]
    if hub_models:
        front["base_model"] = hub_models[0] if len(hub_models) == 1 else hub_models
    if licence:
        front["license"] = licence
    name, where = repo.partition("/")[2] + (f"/{folder}" if folder else ""), f"{repo}/{folder}" if folder else repo
    rows = "\n".join(f"| {what} | {value} |" for what, value in _rows(record, licence))
    parts = [
        f"---\n{yaml.safe_dump(front, sort_keys=False, allow_unicode=True)}---\n",
        f"# {name}\n",
        f"{_kind(record)}, for {_sites(record)}.\n",
        f"| | |\n|---|---|\n{rows}\n",
        _code(f'import sae_jax\n\nd = sae_jax.load("hf:{where}")\ncode = d.encode(x)  # [..., {sum(record.widths.x)}]'),
    ]
    if library:
        model = hub_models[0] if hub_models else _plain(models[0]) if models else "MODEL"
        code = library.code.format(repo=repo, folder=folder, where=where, model=model).replace(' + "/"', "")
        parts.append(f"In {library.name}:\n\n{_code(code)}")
    return "\n".join(parts)


def _rows(record: Record, licence: str | None) -> list[tuple[str, str]]:
    config = base.config_from(record.variant, record.sae, "the record")
    rows = [("encodes", _told(record.encodes)), ("reconstructs", _told(record.reconstructs))]
    rows += [("latents", f"{config.n_latents:,}")]
    rows += [("k", str(config.n_active))] if config.n_active else []
    rows += [("trained on", f"{record.tokens:,} tokens in {record.steps:,} steps")] if record.steps else []
    if record.data and record.data.text:
        rows.append(("text", _plain(record.data.text)))
    for metric, what in _METRICS.items():
        if (value := record.metrics.get(metric)) is not None:
            rows.append((what, f"{value:.2%}" if metric == "dead_fraction" else f"{value:.4g}"))
    if origin := record.origin:
        commit = f" at {origin.revision}" if origin.revision else ""
        rows.append(("made from", f"{_plain(origin.place)}{commit} ({origin.format})"))
        rows += [("changed", change) for change in origin.changes]
    rows.append(("licence", licence or "not stated"))
    return [*rows, ("made with", f"sae_jax {record.program}")]


def _tags(record: Record, library: Library | None) -> list[str]:
    kinds = [record.variant.replace("_", "-")]
    return [*TAGS, *kinds, *([library.name] if library and library.name not in TAGS else [])]


def _kind(record: Record) -> str:
    config = base.config_from(record.variant, record.sae, "the record")
    what = "sparse autoencoder" if record.encodes == record.reconstructs else "sparse dictionary"
    return f"A {what} ({record.variant}) of {config.n_latents:,} latents"


def _sites(record: Record) -> str:
    sources = [*dict.fromkeys(record.encodes + record.reconstructs)]
    models = [*dict.fromkeys(_plain(source.model) for source in sources if source.model)]
    names = ", ".join(source.hook or source.name for source in sources[:8]) + (" and more" if sources[8:] else "")
    return f"{names} of {', '.join(models)}" if models else names


def _told(sources: tuple[SourceRecord, ...]) -> str:
    named = [f"{source.hook or source.name} (d={source.width})" for source in sources]
    return ", ".join(named[:8]) + (f" and {len(named) - 8} more" if named[8:] else "")


def _plain(reference: str) -> str:
    """Without the folders of the machine that it was made on."""
    return reference.rstrip("/").rpartition("/")[2] if reference.startswith("/") else reference


def _code(text: str) -> str:
    return f"```python\n{text}\n```\n"
