"""SAEBench's numbers of a dictionary, by its own code. Runs where sae-bench 0.6.0 is installed; see test_saebench.py.

    python tests/evaluation/in_saebench.py FOLDER

FOLDER holds the language model (model/, as transformers reads it), the dictionary (sae/, as SAELens reads it) and
data.npz; theirs.npz is written there. What SAEBench would fetch from the network is handed to its functions instead:
tokens, activations, labels, and probes.
"""

import os
import sys
from pathlib import Path
from types import SimpleNamespace

os.environ["JAXTYPING_DISABLE"] = "1"  # its annotations are refused by newer jaxtyping, and the evaluation ends

import numpy as np
import torch
from sae_bench.evals.absorption.feature_absorption_calculator import FeatureAbsorptionCalculator
from sae_bench.evals.core import main as core
from sae_bench.evals.core.eval_config import CoreEvalConfig
from sae_bench.evals.scr_and_tpp import main as scr_and_tpp
from sae_bench.evals.sparse_probing import probe_training
from sae_bench.sae_bench_utils import activation_collection, general_utils
from sae_bench.sae_bench_utils.dataset_info import PAIRED_CLASS_KEYS
from sae_lens import SAE
from transformer_lens import HookedTransformer, HookedTransformerConfig
from transformer_lens.pretrained.weight_conversions import convert_gpt2_weights
from transformers import GPT2LMHeadModel

BATCH = 32  # sequences
SCR = {"classifier": "male_professor / female_nurse", "target": "professor / nurse", "spurious": "male / female"}


def language_model(folder: Path) -> HookedTransformer:
    """A GPT-2 as it is: nothing folded, nothing centred, as its activations were when the dictionary learnt them."""
    source = GPT2LMHeadModel.from_pretrained(folder, torch_dtype=torch.float32)
    c = source.config
    config = HookedTransformerConfig(
        n_layers=c.n_layer,
        d_model=c.n_embd,
        n_ctx=c.n_positions,
        d_head=c.n_embd // c.n_head,
        n_heads=c.n_head,
        d_mlp=c.n_inner,
        d_vocab=c.vocab_size,
        act_fn="gelu_new",
        eps=c.layer_norm_epsilon,
        normalization_type="LN",
        device="cpu",
    )
    model = HookedTransformer(config)
    model.load_state_dict(convert_gpt2_weights(source, config), strict=False)
    return model.eval()


def core_numbers(sae, model, ids_ST: torch.Tensor, special: set[int]) -> dict:
    """What `core` says of these sequences."""
    batches = iter(())

    def reset() -> None:
        nonlocal batches
        batches = iter(ids_ST.split(BATCH))

    reset()
    store = SimpleNamespace(
        get_batch_tokens=lambda _: next(batches),
        reset_input_dataset=reset,
        context_size=ids_ST.shape[1],
        store_batch_size_prompts=BATCH,
    )
    n = len(ids_ST) // BATCH
    config = CoreEvalConfig(
        model_name="bundled",
        batch_size_prompts=BATCH,
        n_eval_reconstruction_batches=n,
        n_eval_sparsity_variance_batches=n,
        compute_kl=True,
        compute_ce_loss=True,
        compute_l2_norms=True,
        compute_sparsity_metrics=True,
        compute_variance_metrics=True,
        compute_featurewise_density_statistics=True,
        compute_featurewise_weight_based_metrics=True,
        exclude_special_tokens_from_reconstruction=True,
    )
    metrics, of_latents = core.run_evals(sae, store, model, config, ignore_tokens=special)
    numbers = {f"core/{name}": value for group in metrics.values() for name, value in group.items()}
    kept = ("feature_density", "max_decoder_cosine_sim")
    return numbers | {f"core/{name}": np.array(of_latents[name]) for name in kept}


def sparse_probing(sae, data, task: str) -> dict:
    """Test accuracy of probes of k latents, on its scale and with the features scaled to one variance."""
    codes = {}
    for part in ("train", "test"):
        acts, label = torch.tensor(data[f"{task}/{part}"]), torch.tensor(data[f"{task}/{part}_label"])
        by_class = {"yes": acts[label], "no": acts[~label]}
        codes[part] = activation_collection.get_sae_meaned_activations(by_class, sae, 64)
    found = {}
    std = torch.cat([*codes["train"].values()]).std(0, correction=0)
    scaled = {part: {name: x / std.clamp_min(1e-6) for name, x in each.items()} for part, each in codes.items()}
    own = probe_training.get_top_k_mean_diff_mask
    for k in (1, 2, 5):
        _, accuracies = probe_training.train_probe_on_activations(codes["train"], codes["test"], select_top_k=k)
        train, label = probe_training.prepare_probe_data(codes["train"], "yes")
        mask = own(train, label, k)
        found[f"{task}/latents_{k}"] = np.flatnonzero(~mask.numpy())
        found[f"{task}/accuracy_{k}"] = accuracies["yes"]
        probe_training.get_top_k_mean_diff_mask = lambda *_, mask=mask: mask  # the latents of the unscaled codes
        _, accuracies = probe_training.train_probe_on_activations(scaled["train"], scaled["test"], select_top_k=k)
        probe_training.get_top_k_mean_diff_mask = own
        found[f"{task}/accuracy_scaled_{k}"] = accuracies["yes"]
    return found


def probe_of(weight, bias) -> probe_training.Probe:
    probe = probe_training.Probe(len(weight), torch.float32)
    with torch.no_grad():
        probe.net.weight[:], probe.net.bias[:] = torch.tensor(weight)[None], torch.tensor(bias)
    return probe


def trained(train, test, perform_scr: bool):
    """The probes that SAEBench trains itself."""
    torch.manual_seed(42)
    means = [activation_collection.create_meaned_model_activations(acts) for acts in (train, test)]
    probes, _ = probe_training.train_probe_on_activations(
        *means, use_sklearn=False, batch_size=16, epochs=20, lr=1e-3, perform_scr=perform_scr,
        early_stopping_patience=20, l1_penalty=1e-3,
    )  # fmt: skip
    return probes


def ablations(sae, probes, train, test, ns, perform_scr: bool):
    """(accuracy with latents ablated, accuracy without), as its main function calls them."""
    torch.set_grad_enabled(False)
    classes = [*probes]
    means = activation_collection.create_meaned_model_activations(test)
    clean = scr_and_tpp.get_probe_test_accuracy(probes, classes, means, 500, perform_scr)
    effects = scr_and_tpp.get_all_node_effects_for_one_sae(sae, probes, classes, perform_scr, train, 64)
    changed = scr_and_tpp.perform_feature_ablations(
        probes, sae, 64, test, effects, [int(n) for n in ns], classes, 500, perform_scr
    )
    torch.set_grad_enabled(True)
    return changed, clean


def spurious_removal(sae, data) -> dict:
    """SCR, with the probes that it is handed, and with its own."""
    acts = {}
    for part in ("train", "test"):
        x, target, spurious = (data[f"scr/{part}{name}"] for name in ("", "_target", "_spurious"))
        both, neither = target & spurious, ~target & ~spurious
        masks = {SCR["spurious"]: spurious, SCR["target"]: target, SCR["classifier"]: both}
        others = {SCR["spurious"]: ~spurious, SCR["target"]: ~target, SCR["classifier"]: neither}
        acts[part] = {name: torch.tensor(x[mask]) for name, mask in masks.items()}
        acts[part] |= {PAIRED_CLASS_KEYS[name]: torch.tensor(x[mask]) for name, mask in others.items()}
    handed = {SCR[name]: probe_of(data[f"scr/{name}_weight"], data[f"scr/{name}_bias"]) for name in SCR}
    handed = {name: handed[name] for name in PAIRED_CLASS_KEYS}
    found = {}
    own = trained(acts["train"], acts["test"], True)
    for kind, probes in (("scr", handed), ("scr_own", {name: own[name] for name in PAIRED_CLASS_KEYS})):
        changed, clean = ablations(sae, probes, acts["train"], acts["test"], data["ns"], True)
        scores = scr_and_tpp.get_scr_plotting_dict(changed, clean)
        found[kind] = np.array([scores[f"scr_dir1_threshold_{n}"] for n in data["ns"]])
    return found


def perturbation(sae, data) -> dict:
    """TPP, with the probes and the negative examples that it is handed, and with its own."""
    names = [str(c) for c in range(int(data["tpp/n_classes"]))]
    acts = {
        part: {c: torch.tensor(data[f"tpp/{part}"][data[f"tpp/{part}_label"] == int(c)]) for c in names}
        for part in ("train", "test")
    }
    probes = {c: probe_of(data["tpp/weight"][int(c)], data["tpp/bias"][int(c)]) for c in names}
    own_data = probe_training.prepare_probe_data
    found, sizes = {}, {len(acts[part][c]): part for part in acts for c in names}

    def handed_examples(activations, name, perform_scr=False):
        # Classes follow each other as they do in the lists of chosen examples.
        part, joined = sizes[len(activations[name])], torch.cat([activations[c] for c in names])
        chosen, label = (data[f"tpp/{part}_{what}_{name}"] for what in ("chosen", "is_class"))
        return joined[chosen], torch.tensor(label, dtype=torch.int)

    for kind in ("tpp", "tpp_own"):
        if kind == "tpp":
            probe_training.prepare_probe_data = handed_examples
        else:
            probes = trained(acts["train"], acts["test"], False)
        changed, clean = ablations(sae, probes, acts["train"], acts["test"], data["ns"], False)
        probe_training.prepare_probe_data = own_data
        scores, _ = scr_and_tpp.create_tpp_plotting_dict(changed, clean)
        found[kind] = np.array([scores[f"tpp_threshold_{n}_total_metric"] for n in data["ns"]])
    return found


def absorption(sae, data) -> dict:
    """Of each word, with the letter's probe and main latents that it is handed."""
    found = {}
    for letter in data["absorption/letters"]:
        acts = torch.tensor(data[f"absorption/{letter}_acts"])
        hook = sae.cfg.hook_name

        def run(prompts, names_filter, acts=acts, hook=hook):
            rows = [int(prompt.strip("\n:")[1:]) for prompt in prompts]
            return None, {hook: acts[rows][:, None]}

        calculator = FeatureAbsorptionCalculator(
            SimpleNamespace(run_with_cache=run, to_tokens=lambda _: [[0]]), [], word_token_pos=0
        )
        results = calculator.calculate_absorption(
            sae,
            [f"{letter}{i}" for i in range(len(acts))],
            torch.tensor(data[f"absorption/{letter}_direction"]).float(),
            data[f"absorption/{letter}_main"].tolist(),
            sae.cfg.hook_layer,
            show_progress=False,
        ).word_results
        found[f"absorption/{letter}_share"] = np.array([word.absorption_fraction for word in results])
        found[f"absorption/{letter}_full"] = np.array([word.is_full_absorption for word in results])
    return found


def main(folder: Path) -> None:
    """All of it."""
    torch.manual_seed(0)
    data = np.load(folder / "data.npz")
    _, sae, _ = general_utils.load_and_format_sae("ours", SAE.load_from_disk(folder / "sae", device="cpu"), "cpu")
    ids_ST, special = torch.tensor(data["ids"]).long(), {*data["special"].tolist()}
    found = core_numbers(sae, language_model(folder / "model"), ids_ST, special)
    for task in data["tasks"]:
        found |= sparse_probing(sae, data, str(task))
    found |= spurious_removal(sae, data) | perturbation(sae, data) | absorption(sae, data)
    np.savez(folder / "theirs.npz", **found)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
