# %% [markdown]
# # 4 · Sweep and fit
#
# How does the error fall with width, active latents and compute? A sweep makes the points, `fit` the laws, `advise` the
# next run. Needs no GPU and no network; some minutes on two cores that have nothing else to do.

# %% [markdown]
# Install it, once. Until sae_jax is on the package index, give the path of a clone in the place of its name.

# %%
# %pip install -q sae_jax

# %% [markdown]
# ## Rows
#
# Of the language model that comes with the package; and held-out text, on which members are measured.

# %%
import sae_jax

activations = sae_jax.harvest(
    "laws/set", model="bundled", text="stdlib", heldout="heldout", hooks="resid_post.2", tokens=1_000_000
)

# %% [markdown]
# ## Sweep
#
# Every width with every k: twelve autoencoders, which learn from as few passes over the data as memory allows. Each is
# measured on held-out rows where it has used up a budget of compute, and at the end; the rate is constant, so that one
# run gives the points of all budgets. The call resumes when it is repeated; on a cluster `sae-jax sweep --claim` shares
# the work among any number of machines.

# %%
points = sae_jax.sweep(
    activations,
    out="laws/sweep",
    grid={"n_latents": [128, 256, 512, 1024], "k": [4, 8, 16]},
    compute=(5e10, 1e11, 2e11, 4e11),
    tokens=(400_000,),
    batch_size=1024,
    lr=4e-3,
)
print(len(points), "points, such as", points[0])

# %% [markdown]
# ## Fit
#
# Every law that the points can identify, with intervals and with warnings about what they do not determine; figures and
# `fit.txt` lie beside the table.

# %%
from pathlib import Path

study, files = sae_jax.fit("laws/sweep", k=8)
print(Path("laws/sweep/fit.txt").read_text())
print(*files, sep="\n")

# %% [markdown]
# ## Advise
#
# What to train for a budget, and what error to expect. It says how far that goes beyond the points; beyond ten times
# what was fitted it is a guess.

# %%
advice, seconds = sae_jax.advise(1e12, "laws/sweep/fit.json", target="h200:1")
print(f"{advice.latents} latents, {advice.tokens:,.0f} tokens at rate {advice.lr:.2g}")
print(f"FVU {advice.fvu:.3f}, 90 % interval {advice.fvu_interval}")
print(*advice.notes, sep="\n")

# %% [markdown]
# A page with all of it, tables, laws and figures:

# %%
print(sae_jax.report("laws/sweep"))
