"""Numbers of small models of every family, computed by transformers' torch models in float64.

python -m tests.golden.make_families     # writes families.npz beside this file; needs torch

Made with torch 2.13.0 and transformers 5.24.0. Of each variant of tests/lm/variants.py: the names and shapes of its
tensors, the logits, the residual stream after each layer, and twelve greedy tokens.
"""

import json
import tempfile
from pathlib import Path

import numpy as np

from tests.lm.variants import CONFIGS, ids_of, write_folder

GOLDEN = Path(__file__).with_name("families.npz")
N_NEW = 12


def peer(config, folder):
    """transformers' model of a variant, in float64, and the names and shapes of its tensors."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    settings = {key: value for key, value in config.items() if key != "model_type"}
    empty = AutoModelForCausalLM.from_config(AutoConfig.for_model(config["model_type"], **settings))
    tied = {"lm_head.weight", "embed_out.weight"} if empty.config.tie_word_embeddings else set()
    shapes = {name: list(t.shape) for name, t in empty.state_dict().items() if name not in tied}
    write_folder(folder, config, shapes)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64, attn_implementation="eager").eval()
    return model, shapes


def numbers(config, folder):
    """{what: array} of one variant."""
    import torch

    model, shapes = peer(config, folder)
    ids = torch.tensor(ids_of(config))
    streams, hooks = [], []
    layers = next(m for name, m in model.named_modules() if name.rpartition(".")[2] in ("h", "layers"))
    for layer in layers:
        take = lambda _, __, out: streams.append(out[0] if isinstance(out, tuple) else out)  # noqa: E731
        hooks.append(layer.register_forward_hook(take))
    with torch.no_grad():
        logits = model(ids, use_cache=False).logits
        for hook in hooks:
            hook.remove()
        ones = torch.ones_like(ids)
        ends = {"eos_token_id": None, "pad_token_id": 0, "do_sample": False}
        text = model.generate(ids, attention_mask=ones, max_new_tokens=N_NEW, **ends)
    return {
        "shapes": np.frombuffer(json.dumps(shapes).encode(), np.uint8),
        "logits": logits.numpy()[:, 3::4].astype(np.float32),
        "streams": np.stack([stream.detach().numpy() for stream in streams])[:, 0, 3::4].astype(np.float32),
        "text": text.numpy()[:, ids.shape[1] :].astype(np.int16),
    }


if __name__ == "__main__":
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, config in CONFIGS.items():
            for what, array in numbers(config, Path(folder) / name).items():
                found[f"{name}/{what}"] = array
    np.savez_compressed(GOLDEN, **found)
