# %% [markdown]
# # 2 · A dictionary of your activations
#
# For rows that you have already, from any framework. Needs no GPU and no network; a minute on two cores.

# %% [markdown]
# Install it, once. Until sae_jax is on the package index, give the path of a clone in the place of its name.

# %%
# %pip install -q sae_jax

# %% [markdown]
# ## Rows to learn from
#
# Activations are rows of numbers, `[..., d_model]`: an array of numpy, JAX or torch, several by name, or an iterator of
# blocks, for `sae_jax.write_activations`. Here they are made: each is a sum of a few of 64 known directions, so that we
# can say afterwards whether the dictionary found them.

# %%
import numpy as np

import sae_jax

rng = np.random.default_rng(0)
directions = rng.standard_normal((64, 32)).astype(np.float32)
directions /= np.linalg.norm(directions, axis=1, keepdims=True)
strength = rng.exponential(size=(20_000, 64)) * (rng.random((20_000, 64)) < 0.05)
rows = (strength @ directions).astype(np.float32)

# %% [markdown]
# ## Train
#
# 128 latents, at most 4 of them active in a row. Any setting of the variant or of the run can be given here; a misspelt
# one is refused with the nearest that exists.

# %%
d = sae_jax.train(rows[:16_000], n_latents=128, k=4, steps=400, batch_size=512, lr=4e-3, dead_after_tokens=20_000)
print(d)

# %% [markdown]
# ## Use it
#
# `encode` gives for each row which latents are active and how strongly; `decode` goes back; `d(x)` does both.

# %%
held_out = rows[16_000:]
code = d.encode(held_out)
x_hat = d.decode(code)
fvu = ((held_out - x_hat) ** 2).sum() / ((held_out - held_out.mean(0)) ** 2).sum()
print(f"unexplained on held-out rows: {fvu:.3f}")

# %% [markdown]
# ## Did it find the directions?
#
# For each true direction, the cosine of the nearest decoder row.

# %%
cosine = np.abs(directions @ np.asarray(d.w_dec).T).max(axis=1)
print(f"mean best cosine: {cosine.mean():.3f}")

# %% [markdown]
# ## Keep it
#
# A folder of two files: the arrays as safetensors, and a record of what they are and where they come from.

# %%
d.save("first_dictionary")
again = sae_jax.load("first_dictionary")
assert np.array_equal(again.w_dec, d.w_dec)

# %% [markdown]
# ## Several from one pass
#
# Each batch is read once for all members.

# %%
members = sae_jax.train_members(
    rows, {"k2": {"k": 2}, "k8": {"k": 8}}, n_latents=128, steps=100, batch_size=512, lr=4e-3
)
for name, member in members.items():
    print(name, member.record.variant, member.config.k)

# %% [markdown]
# ## More rows than memory holds
#
# A stream of blocks becomes a set on disk, which training reads in a fresh order each epoch. With `out=` it is a run,
# with checkpoints and a log; the same call resumes it.

# %%
blocks = (rows[i : i + 1000] for i in range(0, len(rows), 1000))
sae_jax.write_activations("streamed", blocks)
settings = {"n_latents": 128, "k": 4, "steps": 400, "batch_size": 512, "lr": 4e-3, "dead_after_tokens": 20_000}
d = sae_jax.train("streamed", out="streamed_run", **settings)
