"""An instruct model for tests: the bundled one with two special tokens more and a chat template."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from sae_jax.lm.model import BUNDLED

TOKENS = ("<|im_start|>", "<|im_end|>")
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + "
    "'\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def write(folder: Path, template: str | list | None = CHATML, **settings) -> Path:
    """The folder of the model; `settings` go into its tokenizer_config.json.

    The new tokens have the ids of the two last pieces, which are left out, so that the embedding has rows for them.
    """
    shutil.copytree(BUNDLED, folder)
    content = json.loads((folder / "tokenizer.json").read_text())
    vocabulary, merges = content["model"]["vocab"], content["model"]["merges"]
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    for token in TOKENS:
        merges.pop()
        piece, number = max(vocabulary.items(), key=lambda item: item[1])
        del vocabulary[piece]
        content["added_tokens"].append({"id": number, "content": token, "special": True, **flags})
    content["added_tokens"].sort(key=lambda token: token["id"])
    (folder / "tokenizer.json").write_text(json.dumps(content))
    config = json.loads((folder / "tokenizer_config.json").read_text()) | settings
    if template is not None:
        config["chat_template"] = template
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder
