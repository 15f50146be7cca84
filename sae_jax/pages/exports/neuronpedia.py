"""Neuronpedia's own exports, which an instance imports: rows of its tables, as JSON lines.

    MODEL/SOURCE/{model,release,sourceset,source}.jsonl
    MODEL/SOURCE/features/batch-N.jsonl.gz          1,024 latents a file
    MODEL/SOURCE/activations/batch-N.jsonl.gz       their examples
    MODEL/SOURCE/explanations/batch-N.jsonl.gz      their labels, of those that have one

SOURCE is LAYER-TITLE. Rows belong to the user that instances make for imports. A label's explainer is left out: it
would have to be one of those that the instance knows.
"""

from __future__ import annotations

import gzip
import hashlib
from collections.abc import Iterable, Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from sae_jax.pages.export import Exported, batches, examples, json_bytes, layer_of, numbers, slug, text
from sae_jax.pages.exports.saedashboard import bounds, statistics
from sae_jax.pages.latents import Latent
from sae_jax.record import Record

NAME = "neuronpedia"
LATENTS_PER_FILE = 1024
CREATOR = "clkht01d40000jv08hvalcvly"  # whom instances give imports to


def check(record: Record) -> None:
    """See the package."""
    layer_of(record)


def write(folder: Path, exported: Exported, latents: Iterator[Latent], earlier: Path | None) -> None:
    """See the package."""
    name = slug(exported.title)
    source = f"{exported.layer}-{name}"
    place = folder / exported.model / source
    parts = {part: place / part for part in ("features", "activations", "explanations")}
    for path in parts.values():
        path.mkdir(parents=True)
    for kind, row in _rows_about(exported, name, source).items():
        _write_lines(place / f"{kind}.jsonl", [row])
    key = {"modelId": exported.model, "layer": source}
    for i, batch in enumerate(batches(latents, LATENTS_PER_FILE)):
        rows = {
            "features": [_feature(exported, latent, key, name) for latent in batch],
            "activations": [row for latent in batch for row in _activations(exported, latent, key)],
            "explanations": [_explanation(exported, latent, key) for latent in batch if latent.label],
        }
        for part, path in parts.items():
            if rows[part]:
                _write_lines(path / f"batch-{i}.jsonl.gz", rows[part])


def _rows_about(exported: Exported, name: str, source: str) -> dict[str, dict[str, Any]]:
    """A row for the model, the release, the set of sources and the source."""
    now, model, title = datetime.now(UTC).isoformat(), exported.model, exported.title
    table = exported.site.subject.table
    made = {"creatorId": CREATOR, "createdAt": now}
    return {
        "model": {
            **{"id": model, "instruct": False, "displayNameShort": model, "displayName": model, "layers": 0},
            **{"neuronsPerLayer": 0, "owner": "", "visibility": "PUBLIC", "updatedAt": now, **made},
        },
        "release": {
            **{"name": name, "description": text(exported.site.about), "descriptionShort": title, "urls": []},
            **{"creatorName": "", "creatorNameShort": "", "visibility": "PUBLIC", **made},
        },
        "sourceset": {
            **{"modelId": model, "name": name, "description": text(exported.site.about), "type": "", "creatorName": ""},
            **{"releaseName": name, "urls": [], "hasDashboards": True, "visibility": "PUBLIC", **made},
        },
        "source": {
            **{"id": source, "modelId": model, "setName": name, "hasDashboards": True, "inferenceEnabled": False},
            **{"dataset": exported.dataset, "num_prompts": table.sequences.shape[0]},
            **{"num_tokens_in_prompt": table.sequences.shape[1], "visibility": "PUBLIC", **made},
        },
    }


def _feature(exported: Exported, latent: Latent, key: Mapping[str, str], name: str) -> dict[str, Any]:
    near, cosines = latent.near if latent.near is not None else ((), ())
    return {
        **key,
        "index": str(latent.number),
        "sourceSetName": name,
        "creatorId": CREATOR,
        "maxActApprox": numbers(latent.max)[0],
        "topkCosSimIndices": [int(other) for other in near],
        "topkCosSimValues": numbers(cosines),
        "hasVector": False,
        "vector": [],
        "hookName": exported.record.encodes[0].hook,
        **statistics(exported, latent),
        **{f"logits_hist_data_bar_{what}": [] for what in ("heights", "values")},
        **{f"neuron_alignment_{what}": [] for what in ("indices", "values", "l1")},
        **{f"correlated_neurons_{what}": [] for what in ("indices", "pearson", "l1")},
        "decoder_weights_dist": [],
    }


def _activations(exported: Exported, latent: Latent, key: Mapping[str, str]) -> Iterator[dict[str, Any]]:
    for i, example in enumerate(examples(latent)):
        low, high, share = bounds(example, latent)
        yield {
            "id": _identity(exported, key, latent.number, f"activation {i}"),
            **key,
            "index": str(latent.number),
            "creatorId": CREATOR,
            "dataSource": exported.dataset,
            "tokens": [exported.tokens[token] for token in example.ids.tolist()],
            "values": example.values,
            "maxValue": max(example.values),
            "maxValueTokenIndex": example.values.index(max(example.values)),
            "minValue": min(example.values),
            "binMin": low,
            "binMax": high,
            "binContains": share,
            "qualifyingTokenIndex": example.peak,
            "dfaValues": [],
            "dfaMaxValue": None,
            "dfaTargetIndex": None,
        }


def _explanation(exported: Exported, latent: Latent, key: Mapping[str, str]) -> dict[str, Any]:
    assert latent.label is not None
    return {
        "id": _identity(exported, key, latent.number, "explanation"),
        **key,
        "index": str(latent.number),
        "authorId": CREATOR,
        "description": text(latent.label[0]),
        **dict.fromkeys(("embedding", "typeName", "explanationModelName")),
    }


def _identity(exported: Exported, key: Mapping[str, str], latent: int, what: str) -> str:
    """The same for the same dictionary each time, and no other's; 25 characters, as theirs."""
    told = (*key.values(), exported.record.program, exported.record.data and exported.record.data.content, latent, what)
    return "c" + hashlib.blake2b(repr(told).encode("utf-8", "backslashreplace"), digest_size=12).hexdigest()


def _write_lines(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    data = b"".join(map(json_bytes, rows))
    path.write_bytes(gzip.compress(data, compresslevel=5, mtime=0) if path.suffix == ".gz" else data)
