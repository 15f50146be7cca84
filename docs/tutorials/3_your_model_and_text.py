# %% [markdown]
# # 3 · Your model and text
#
# From a language model and a text to a dictionary that is measured inside the model. Needs no GPU, and no network as it
# stands, since the model comes with the package; two minutes on two cores.

# %% [markdown]
# Install it, once. Until sae_jax is on the package index, give the path of a clone in the place of its name.

# %%
# %pip install -q sae_jax

# %% [markdown]
# ## The model
#
# `MODEL` may be a folder in Hugging Face format, a name on the hub such as `EleutherAI/pythia-160m` (which is
# downloaded), or a `.gguf` file, of GPT-2, GPT-NeoX, Llama, Mistral, Qwen 2 or 3, or Gemma 1 to 3. Where can it be
# read?

# %%
from sae_jax import lm

MODEL = "bundled"
spec = lm.read_spec(MODEL)
print(f"layers 0 to {spec.n_layers - 1}, {spec.d_model} numbers a token; hooks are point.layer, and points are")
print(*lm.points(spec))

# %% [markdown]
# ## The text
#
# A file, a folder or a glob (plain text, JSON Lines, CSV, Parquet, packed or not), or `hf:DATASET`, which streams. Here
# a file of JSON Lines, one document a line, of the modules of this Python; and another one that no row is made of, to
# measure on.

# %%
import json
import sysconfig
from pathlib import Path

modules = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
texts = [path.read_text(encoding="utf-8", errors="replace") for path in modules]
Path("mine").mkdir(exist_ok=True)
for name, part in (("text", texts[::2]), ("heldout", texts[1::2])):
    Path(f"mine/{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in part))

# %% [markdown]
# ## Harvest
#
# Run the text through the model and store the activations of two places, side by side. It resumes when it is called
# again. Settings are those of `sae-jax harvest`; for a large model also `precision="bfloat16"`, and `split=8` to spread
# a copy over eight devices.

# %%
import sae_jax

activations = sae_jax.harvest(
    "mine/set",
    model=MODEL,
    text="mine/text.jsonl",
    heldout="mine/heldout.jsonl",
    hooks=("resid_post.1", "mlp_out.1"),
    tokens=400_000,
)
print(activations)

# %% [markdown]
# ## Train
#
# `site` says which source. In a dictionary with `variant="transcoder"` and `reconstruct="mlp_out.1"` another would be
# written than is read.

# %%
d = sae_jax.train(
    activations, out="mine/run", site="resid_post.1", variant="batch_topk", n_latents=1024, k=16, steps=600,
    batch_size=2048,
)  # fmt: skip

# %% [markdown]
# ## Measure
#
# On held-out text: what the reconstruction leaves unexplained (`fvu`), and what the model loses when the reconstruction
# stands in the place of the activation (`ce_clean`, `ce_sae`; `loss_recovered` is 1 for nothing). Beside it principal
# components, as many active.

# %%
measured = sae_jax.evaluate("mine/run", tokens=20_000, baselines=("pca",))
for name, metrics in measured.items():
    print(name, {key: round(metrics[key], 3) for key in ("fvu", "l0", "loss_recovered", "silent_fraction")})

# %% [markdown]
# ## Read
#
# One page about the run, with its curves and all that was measured; and the pages of its latents.

# %%
print(sae_jax.report("mine/run"))
print(sae_jax.dashboard("mine/run", "mine/pages", tokens=100_000))
