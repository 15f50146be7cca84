"""What we export of latents, read by the programs' own code: SAEDashboard, Neuronpedia's client, circuit-tracer.

python check.py FOLDER    FOLDER: what `python -m tests.pages.exported FOLDER` wrote

sae_jax is not in this environment. Neuronpedia's importer is no package; what it inserts are the fields of rows that
the client reads, too.
"""

from __future__ import annotations

import gzip
import json
import sys
import urllib.request
import zlib
from pathlib import Path

from circuit_tracer.frontend.feature_models import Model
from circuit_tracer.frontend.graph_models import Node
from circuit_tracer.frontend.local_server import serve
from neuronpedia.np_activation import Activation
from neuronpedia.np_explanation import Explanation
from neuronpedia.np_source_set import SourceSet
from sae_dashboard.neuronpedia.neuronpedia_dashboard import NeuronpediaDashboardBatch

N_LATENTS, LAYER, FAR = 300, 3, 290


def check_saedashboard(folder: Path) -> list:
    """Its dataclasses take every file, and give back what it holds."""
    features = []
    for i in range(3):
        content = json.loads((folder / f"batch-{i}.json").read_text())
        batch = NeuronpediaDashboardBatch(**content)
        assert batch.to_dict() == content
        features += batch.features
    assert len(features) == N_LATENTS
    assert len(features[FAR].activations) > 20
    return features


def check_neuronpedia(folder: Path, features: list) -> None:
    """The client reads rows as it reads those of its server, with the values that the other format has."""
    (place,) = (folder / "model-1").iterdir()

    def rows(name: str) -> list[dict]:
        return [json.loads(line) for line in gzip.open(place / name / "batch-0.jsonl.gz", "rt", encoding="utf-8")]

    assert [int(row["index"]) for row in rows("features")] == list(range(N_LATENTS))
    activations = []
    for row in rows("activations"):
        # -1 stands for "one of the strongest", in Neuronpedia's own rows as well, and its client takes no such share.
        renamed = {
            **row,
            "source": row["layer"],
            "binContains": None if row["binContains"] == -1 else row["binContains"],
        }
        activations.append(Activation.from_np_db_json(renamed))
    far = [activation for activation in activations if activation.index == FAR]
    assert [a.values for a in far] == [a.values for a in features[FAR].activations]
    assert [a.tokens for a in far] == [a.tokens for a in features[FAR].activations]
    (label,) = (Explanation.from_np_db_json({**row, "source": row["layer"]}) for row in rows("explanations"))
    assert (label.index, label.text) == (FAR, "<b>cats</b>")
    source = json.loads((place / "source.jsonl").read_text())
    sources = SourceSet.from_np_db_json({**json.loads((place / "sourceset.jsonl").read_text()), "sources": [source]})
    assert sources.get_source_for_layer_number(LAYER).id == place.name


def check_circuit_tracer(folder: Path, features: list) -> None:
    """Its model of a latent takes every record, under the number of a graph's node, and its server serves them."""
    part = json.loads(gzip.decompress((folder / "features" / "index.json.gz").read_bytes()))[str(LAYER)]
    data, offsets = (folder / "features" / part["filename"]).read_bytes(), part["offsets"]
    server = serve(str(folder.parent), port=0)
    port = server.httpd.server_address[1]
    for n in range(N_LATENTS):
        record = data[offsets[n] : offsets[n + 1]]
        packed = Model.model_validate_json(zlib.decompress(record[4 : 4 + int.from_bytes(record[:4], "little")]))
        node = Node.feature_node(LAYER, 0, n)
        address = f"http://localhost:{port}/data/{folder.name}/latents/{node.feature}.json"
        with urllib.request.urlopen(address) as answer:
            assert Model.model_validate_json(answer.read()) == packed
        assert packed.index == n
        examples = [example for group in packed.examples_quantiles for example in group.examples]
        assert [e.tokens_acts_list for e in examples] == [a.values for a in features[n].activations]
    server.stop()


if __name__ == "__main__":
    exported = Path(sys.argv[1])
    of_dashboard = check_saedashboard(exported / "saedashboard")
    check_neuronpedia(exported / "neuronpedia", of_dashboard)
    check_circuit_tracer(exported / "circuit-tracer", of_dashboard)
    sys.stdout.write(f"{N_LATENTS} latents read by SAEDashboard, Neuronpedia's client and circuit-tracer\n")
