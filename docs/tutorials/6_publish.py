# %% [markdown]
# # 6 · Publish a dictionary
#
# Export for other libraries, write a card, push to the Hugging Face hub. Nothing is sent anywhere unless you set a
# token and a repository below. Needs no GPU; two minutes on two cores.

# %% [markdown]
# Install it, once. Until sae_jax is on the package index, give the path of a clone in the place of its name.

# %%
# %pip install -q sae_jax

# %% [markdown]
# ## A dictionary to publish
#
# A small one, of the language model that comes with the package. Measure it first: what was never measured is not on
# the card.

# %%
import sae_jax

sae_jax.harvest("mine/set", model="bundled", text="stdlib", heldout="heldout", hooks="resid_post.2", tokens=400_000)
sae_jax.train("mine/set", out="mine/run", variant="batch_topk", n_latents=1024, k=16, steps=600, batch_size=2048)
sae_jax.evaluate("mine/run", tokens=20_000)
d = sae_jax.load("mine/run")
print(d)

# %% [markdown]
# ## For other libraries
#
# SAELens reads this folder with `SAE.load_from_disk("mine/for-saelens")`. A selection over a batch becomes thresholds
# there. Others are sparsify, dictionary_learning, gemma_scope and circuit_tracer; `sae_jax` is ours, which keeps the
# record whole.

# %%
record = sae_jax.export("mine/run", "saelens", "mine/for-saelens")

# %% [markdown]
# And back. Products are in float32 in what is imported, and may be in bfloat16 in ours, so that they differ a little.

# %%
import numpy as np

sae_jax.import_dictionary("mine/for-saelens", "mine/back")
rows = sae_jax.open_activations("mine/set").read_chunk("resid_post.2", 0).astype(np.float32)
for name, dictionary in (("ours", d), ("back from SAELens", sae_jax.load("mine/back"))):
    left = ((rows - dictionary(rows)) ** 2).sum() / ((rows - rows.mean(0)) ** 2).sum()
    print(f"{name}: {left:.4f} of the variance of {len(rows)} rows unexplained")

# %% [markdown]
# ## The card
#
# README.md of what is published: tags under which people search, base model, site, width, k, metrics, and the lines
# that load it. A push writes it.

# %%
from sae_jax.interchange import card

print(card.write(d.record, "you/saes", "resid_post.2", "saelens", "apache-2.0"))

# %% [markdown]
# ## Push
#
# Log in with `hf auth login`, or set `HF_TOKEN`. The token goes to the hub's own client and nowhere else. One commit; a
# repository that is not there is made. Everyone then loads it with `sae_jax.load("hf:you/saes/resid_post.2")`.

# %%
import os

REPOSITORY = None  # "you/saes/resid_post.2"
if REPOSITORY and os.environ.get("HF_TOKEN"):
    print(sae_jax.push("mine/run", REPOSITORY, "saelens", licence="apache-2.0"))
