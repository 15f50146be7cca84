"""The same numbers as transformers' torch GPT-2, on a random model and on the bundled one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sae_jax.lm import Hook, generate, load, run
from sae_jax.lm.model import BUNDLED

pytestmark = pytest.mark.peers
torch = pytest.importorskip("torch")


@pytest.fixture(params=["random", "bundled"])
def folder(request, tmp_path):
    if request.param == "bundled":
        return BUNDLED
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    shape = {"n_layer": 3, "n_embd": 32, "n_head": 4, "n_positions": 40, "vocab_size": 64, "n_inner": 72}
    random = GPT2LMHeadModel(GPT2Config(**shape, bos_token_id=0, eos_token_id=0))
    with torch.no_grad():
        for p in random.parameters():
            p.add_(0.1 * torch.randn_like(p))  # norms and biases start at values that hide a missing term
    random.save_pretrained(tmp_path)
    return tmp_path


def test_logits_hidden_states_and_greedy_text_are_equal(folder):
    from transformers import AutoModelForCausalLM

    model = load(str(folder))
    peer = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = np.random.default_rng(0).integers(0, model.spec.n_vocab, (2, 24))
    with torch.no_grad():
        theirs = peer(torch.tensor(ids), output_hidden_states=True, use_cache=False)
        text = peer.generate(
            torch.tensor(ids),
            attention_mask=torch.ones(ids.shape),  # or it takes id 0 in the prompt for padding
            max_new_tokens=12,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )

    hooks = [Hook(layer, "resid_pre") for layer in range(model.spec.n_layers)]
    ids_BT = jnp.asarray(ids, jnp.int32)
    ours = jax.jit(lambda model, ids_BT: run(model, ids_BT, capture=hooks))(model, ids_BT)
    np.testing.assert_allclose(ours.logits, theirs.logits.numpy(), atol=1e-4)
    for hook in hooks:  # transformers lists the embedding first and puts the last block through the final norm
        np.testing.assert_allclose(ours.acts[hook], theirs.hidden_states[hook.layer].numpy(), atol=1e-4)
    np.testing.assert_array_equal(generate(model, ids_BT, 12, jax.random.key(0)), text.numpy())
