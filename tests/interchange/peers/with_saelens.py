"""sae-lens 6.54 loads what we export, and writes what we import."""

from __future__ import annotations

from pathlib import Path

import torch
from common import D, K, N, cases, compare, drawn, golden, main, rows
from sae_lens import SAE
from sae_lens.registry import get_sae_class

SETTINGS = {
    "topk": {"k": K, "rescale_acts_by_decoder_norm": False},
    "topk_rescaled": {"k": K, "rescale_acts_by_decoder_norm": True},
    "topk_layer_norm": {"k": K, "rescale_acts_by_decoder_norm": False, "normalize_activations": "layer_norm"},
    "standard": {},
    "jumprelu": {},
    "gated": {},
    "transcoder": {"d_out": D},
    "skip_transcoder": {"d_out": D},
    "jumprelu_transcoder": {"d_out": D},
    "jumprelu_skip_transcoder": {"d_out": D},
    "abstopk": {"k": K, "rescale_acts_by_decoder_norm": True},
}


def check(folder: Path) -> None:
    """Of both formats that it reads."""
    for name in ("saelens", "saelens_and_sparsify"):
        for case in cases(folder / name):
            sae, x = SAE.load_from_disk(str(case.folder), device="cpu"), torch.tensor(case.x)
            with torch.no_grad():
                if "skip" not in case.name:  # which needs x
                    compare("sae-lens, decode", case, sae.encode(x).numpy(), sae.decode(sae.encode(x)).numpy())
                compare("sae-lens", case, sae.encode(x).numpy(), sae(x).numpy())


def write(folder: Path) -> None:
    """One of each architecture."""
    for seed, (name, settings) in enumerate(SETTINGS.items()):
        architecture = name if name in ("skip_transcoder", "jumprelu_skip_transcoder") else name.split("_r")[0]
        architecture = architecture.replace("_layer_norm", "")
        sae_class, config_class = get_sae_class(architecture)
        settings = {"apply_b_dec_to_input": "transcoder" not in name, **settings}
        sae = sae_class(config_class(d_in=D, d_sae=N, dtype="float32", device="cpu", **settings))
        drawn_arrays = drawn({each: tuple(p.shape) for each, p in sae.state_dict().items()}, seed)
        sae.load_state_dict({each: torch.tensor(array) for each, array in drawn_arrays.items()})
        sae.cfg.metadata.hook_name = "blocks.1.hook_resid_post"
        sae.save_model(str(folder / name))
        x = torch.tensor(rows())
        with torch.no_grad():
            golden(folder / name, rows(), sae.encode(x).numpy(), sae(x).numpy())


if __name__ == "__main__":
    main(check, write)
