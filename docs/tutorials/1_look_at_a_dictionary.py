# %% [markdown]
# # 1 · Look at a dictionary
#
# What is in a sparse autoencoder: which latents are active in a text, what tells two kinds of text apart, what a latent
# does to what the model writes, and pages of all of them. Needs no GPU and no network; two minutes on two cores.

# %% [markdown]
# Install it, once. Until sae_jax is on the package index, give the path of a clone in the place of its name.

# %%
# %pip install -q sae_jax

# %% [markdown]
# ## A dictionary
#
# A small language model of Python source comes with the package, so one can be trained on the spot: activations of
# 400,000 tokens of the standard library, then 1,024 latents of which 16 are active at a token. Others' are opened with
# `sae_jax.load("hf:...")` (tutorial 5).

# %%
import sae_jax

activations = sae_jax.harvest(
    "look/set", model="bundled", text="stdlib", heldout="heldout", hooks="resid_post.2", tokens=400_000
)
d = sae_jax.train(activations, out="look/run", n_latents=1024, k=16, steps=600, batch_size=2048)
print(d)

# %% [markdown]
# A dictionary encodes rows of activations: for each, which latents are active and how strongly. The reconstruction is a
# sum of as many decoder rows.

# %%
rows = activations.read_chunk("resid_post.2", 0)[:5]
code = d.encode(rows)
print(code.indices[0], code.values[0])
error = ((rows - d(rows)) ** 2).sum() / ((rows - rows.mean(0)) ** 2).sum()
print(f"of these rows it leaves {error:.3f} of the variance unexplained")

# %% [markdown]
# ## A text
#
# The strongest latents at each token.

# %%
tokens, latents, values = sae_jax.active("look/run", "with open(path) as file:", n=3)
for token, which, how_much in zip(tokens, latents, values, strict=True):
    print(f"{token!r:16}", "  ".join(f"{i} ({value:.1f})" for i, value in zip(which, how_much, strict=True) if value))

# %% [markdown]
# ## What tells two kinds of text apart
#
# Give texts that have what you look for, and others that are alike in all else. Latents are ranked on half of the texts
# and judged on the other half. AUC 1: active in the first kind alone, 0: in the second alone, 0.5: chance.

# %%
names = ["value", "item", "key", "node", "line", "path", "result", "total", "index", "name"] * 3
returns = [f"def f({name}):\n    return {name}" for name in names]
yields = [f"def f({name}):\n    yield {name}" for name in names]
for latent in sae_jax.find("look/run", returns, yields, n=5):
    print(
        f"{latent.latent:5}  AUC {latent.auc:.2f}, 90 % interval {latent.interval[0]:.2f} to {latent.interval[1]:.2f}"
    )

# %% [markdown]
# ## What a latent does
#
# The model continues a prompt as it is, and with the latent held at multiples of the largest value it has on rows of
# the set. One prompt shows what may happen, no more.

# %%
tokens, latents, values = sae_jax.active("look/run", "def f(value):\n    return", n=1)
latent = int(latents[-1, 0])
largest, written = sae_jax.steer("look/run", "class Point:\n    def area(self):\n        ", [latent], [0, 2], tokens=20)
for text in written:
    print("as it is" if text.scale is None else f"{text.scale} times", repr(text.text))

# %% [markdown]
# ## All of them
#
# A folder of pages: open `look/pages/index.html` in a browser. Each latent has its strongest contexts, the tokens that
# it promotes, its neighbours and the histogram of its values. `sae-jax explore look/run` serves the same with the model
# at hand, to type texts and to steer.

# %%
print(sae_jax.dashboard("look/run", "look/pages", tokens=100_000))
