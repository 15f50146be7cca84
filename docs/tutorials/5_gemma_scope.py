# %% [markdown]
# # 5 · Open Gemma Scope, and steer
#
# A dictionary that others trained: which latents are active in a text, and what the model writes with one of them held
# up. With `ONLINE = True` it is Gemma Scope's of layer 20 of Gemma 2 2B, which **needs a network, an account on the
# Hugging Face hub that has accepted Gemma's licence (`hf auth login`), gigabytes of downloads, and a GPU or patience**.
# With `False`, as it stands, nothing is downloaded: a small dictionary of the model that comes with the package is
# written in the same format, and all cells after that are the same.

# %% [markdown]
# Install it, once. Until sae_jax is on the package index, give the path of a clone in the place of its name.

# %%
# %pip install -q sae_jax

# %%
import sae_jax

ONLINE = False

# %% [markdown]
# ## Which dictionary
#
# `hf:owner/repository/folder` names one on the hub; `saelens:RELEASE/ID`, one in SAELens' registry.

# %%
if ONLINE:
    MODEL, HOOK, TEXT = "google/gemma-2-2b", "resid_post.20", "hf:monology/pile-uncopyrighted:train"
    PLACE = "hf:google/gemma-scope-2b-pt-res/layer_20/width_16k/average_l0_71"
    PROMPT = "My favourite way to spend a weekend is"
else:
    MODEL, HOOK, TEXT = "bundled", "resid_post.2", "stdlib"
    PLACE = "scope/gemma-scope-2b-pt-res/layer_2/width_1k/average_l0_16"
    PROMPT = "def get(self, key):\n    if value is not"

# %% [markdown]
# ## Rows of the model
#
# A published dictionary comes without activations. Some are needed to know how strong its latents get, and to measure
# it.

# %%
settings = {"precision": "bfloat16", "batch_tokens": 8192} if ONLINE else {"heldout": "heldout"}
rows = sae_jax.harvest("scope/set", model=MODEL, text=TEXT, hooks=HOOK, tokens=100_000, **settings)

# %% [markdown]
# Without a network: a stand-in for what others published, in Gemma Scope's format, a `params.npz` with W_enc, W_dec,
# biases and thresholds, which a `batch_topk` has.

# %%
if not ONLINE:
    small = sae_jax.train(rows, variant="batch_topk", n_latents=1024, k=16, steps=600, batch_size=2048)
    sae_jax.export(small, "gemma_scope", PLACE)

# %% [markdown]
# ## Open it
#
# `sae_jax.load("hf:...")` opens one on the hub at once; `import_dictionary` writes a folder that every command takes.

# %%
sae_jax.import_dictionary(PLACE, "scope/dictionary")
d = sae_jax.load("scope/dictionary")
print(d)

# %% [markdown]
# ## How good is it here?
#
# On held-out text, in the model; where none is named, on the rows of before.

# %%
measured = sae_jax.evaluate("scope/dictionary", data="scope/set", tokens=10_000)["scope/dictionary"]
print({name: round(measured[name], 3) for name in ("fvu", "l0", "loss_recovered") if name in measured})

# %% [markdown]
# ## Its latents in a text

# %%
tokens, latents, values = sae_jax.active(d, PROMPT, n=3, data="scope/set", model=MODEL)
for token, which, how_much in zip(tokens, latents, values, strict=True):
    print(f"{token!r:16}", "  ".join(f"{i} ({value:.1f})" for i, value in zip(which, how_much, strict=True) if value))

# %% [markdown]
# ## Steer
#
# The strongest latent at the last token, held at 0, 1 and 2 times the largest value that it has on the rows; everything
# else of the activation stays as it is, what the dictionary does not reconstruct included.

# %%
latent = int(latents[-1, 0])
largest, written = sae_jax.steer(d, PROMPT, [latent], [0, 1, 2], tokens=20, data="scope/set", model=MODEL)
print(f"latent {latent}, largest value {largest[0]:.1f}")
for text in written:
    print("as it is" if text.scale is None else f"{text.scale} times", repr(text.text))

# %% [markdown]
# Which latents made the model say what it says next, by how many nats:

# %%
(said,) = sae_jax.attribute(d, PROMPT, n=5, data="scope/set", model=MODEL)
print(f"{said.text!r}, log-probability {said.log_prob:.2f}")
for share in said.latents:
    print(f"latent {share.latent:5} {share.attribution:+.3f}, lost without it {share.ablated:+.3f}")
print(f"others {said.others:+.3f}, what the dictionary leaves out {said.error:+.3f}")
