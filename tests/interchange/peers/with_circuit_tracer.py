"""circuit-tracer 0.5.0 loads what we export of transcoders trained on the bundled model, and writes what we import."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import yaml
from circuit_tracer.transcoder.activation_functions import JumpReLU
from circuit_tracer.transcoder.cross_layer_transcoder import CrossLayerTranscoder, load_clt
from circuit_tracer.transcoder.single_layer_transcoder import (
    SingleLayerTranscoder,
    TranscoderSet,
    load_transcoder_set,
)
from common import Case, D, N, cases, compare, drawn, golden, main, rows

READS, WRITES = "mlp.hook_in", "hook_mlp_out"
LAYERS = 3


def check(folder: Path) -> None:
    """Sets and cross-layer transcoders, layer by layer, to the last one."""
    for case in cases(folder / "circuit_tracer"):
        settings = yaml.safe_load((case.folder / "config.yaml").read_text())
        hooks = settings["feature_input_hook"], settings["feature_output_hook"]
        assert hooks == (READS, WRITES), hooks
        if settings["model_kind"] == "transcoder_set":
            paths = dict(enumerate(sorted(map(str, case.folder.glob("layer_*.safetensors")))))
            coder = load_transcoder_set(paths, "scan", *hooks, device=torch.device("cpu"))
        else:
            coder = load_clt(str(case.folder), *hooks, device=torch.device("cpu"), dtype=torch.float32)
        z, y = computed(coder, case.x)
        assert coder.n_layers == len(case.x), (coder.n_layers, case.x.shape)
        compare("circuit-tracer", case, z, y)
        last = Case(f"{case.name}, last layer", case.folder, case.x[-1], case.z[-1], case.y[-1])
        compare("circuit-tracer", last, z[-1], y[-1])


def computed(coder: TranscoderSet | CrossLayerTranscoder, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(features [L, B, n], reconstruction [L, B, d]) of rows [L, B, d]."""
    with torch.no_grad():
        z = coder.encode(torch.tensor(x))
        features = z if isinstance(coder, TranscoderSet) else z.to_sparse()
        return z.numpy(), coder.decode(features, torch.tensor(x)).numpy()


def write(folder: Path) -> None:
    """Its own files, of sets and of cross-layer transcoders."""
    for name, is_jump in (("set", False), ("set_jumprelu", True)):
        members = {}
        for i in range(LAYERS):
            activation = JumpReLU(torch.zeros(N)) if is_jump else torch.nn.functional.relu
            member = SingleLayerTranscoder(D, N, activation, i, skip_connection=not is_jump, dtype=torch.float32)
            members[i] = _filled(member, i)
        coder = TranscoderSet(members, READS, WRITES)
        _finish(folder / name, coder, "transcoder_set")
    for name, activation in (("clt", "relu"), ("clt_jumprelu", "jump_relu")):
        coder = CrossLayerTranscoder(LAYERS, N, D, activation, lazy_decoder=False, dtype=torch.float32)
        _finish(folder / name, _filled(coder, 7), "cross_layer_transcoder")


def _filled(coder: torch.nn.Module, seed: int) -> torch.nn.Module:
    arrays = drawn({each: tuple(p.shape) for each, p in coder.state_dict().items()}, seed)
    coder.load_state_dict({each: torch.tensor(array) for each, array in arrays.items()})
    return coder


def _finish(folder: Path, coder: TranscoderSet | CrossLayerTranscoder, kind: str) -> None:
    folder.mkdir()
    coder.to_safetensors(str(folder))
    settings = {"model_name": "someone/model", "model_kind": kind, "scan": "someone/set"}
    settings |= {"feature_input_hook": READS, "feature_output_hook": WRITES}
    (folder / "config.yaml").write_text(yaml.safe_dump(settings))
    x = np.stack([rows() + i for i in range(LAYERS)]).astype(np.float32)
    golden(folder, x, *computed(coder, x))


if __name__ == "__main__":
    main(check, write)
