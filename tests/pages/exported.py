"""Exports of a dictionary whose tokens, labels and title are hostile: for the tests, and for the readers' own check."""

from __future__ import annotations

from pathlib import Path

from sae_jax.pages import export
from sae_jax.record import DataRecord, Normalisation, Record, SourceRecord
from tests.pages import test_dashboard as shown

TITLE = 'a</script> "dictionary"\udcff'
LAYER = 3
FORMATS = ("neuronpedia", "saedashboard", "circuit-tracer")


def record(layer: int = LAYER, n_layers: int = 1, **sae) -> Record:
    sources = tuple(
        SourceRecord(f"mlp_in.{i}", shown.D, f"mlp_in.{i}", "hf:someone/model-1")
        for i in range(layer, layer + n_layers)
    )
    data = DataRecord("0123", "/home/someone/set", "hf:someone/model-1", "base=/home/someone/text.txt")
    settings = {"n_latents": shown.F, **sae}
    return Record("transcoder", settings, sources, sources, Normalisation(), data, 1, 1, "live", {}, "0.1.0")


def write(folder: Path, format: str, of: Record | None = None, **changes) -> export.Exported:
    """What was exported."""
    exported = export.Exported(shown.made(title=TITLE, **changes), of or record())
    export.write(format, folder, exported)
    return exported


if __name__ == "__main__":
    import sys

    for name in FORMATS:
        write(Path(sys.argv[1]) / name, name)
