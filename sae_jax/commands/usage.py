"""What `sae-jax --help` says."""

from __future__ import annotations

COMMANDS = {
    "hooks": "where activations of a language model can be read, and what other libraries call it",
    "harvest": "text through a language model into an activation set on disk",
    "selftest": "try the machine: exact results, exchanges, storage, save, kill and restore, time of a step",
    "plan": "compile the train step for machines that are not there: does it fit, what does it do",
    "train": "a sparse autoencoder on an activation set; repeat the command to resume",
    "sweep": "train a grid of autoencoders and measure each at every budget; repeat the command to resume",
    "evaluate": "reconstruction, sparsity and effect on the language model, for a run",
    "collect": "where in a sample of text each latent is active; repeat the command to resume",
    "explain": "what latents stand for, by a language model or by people, and how well that predicts them",
    "find": "the latents that are active in a text, or that tell two kinds of texts apart",
    "steer": "what the language model writes with latents set to chosen values",
    "attribute": "the latents that made the language model say a token after a prompt",
    "dashboard": "a static site to look at the latents of a run",
    "explore": "that site on this machine, with the model: latents of a text that is typed, steering, chat",
    "import": "a dictionary of another program: SAELens, sparsify, Gemma Scope and others",
    "export": "a dictionary for another program",
    "fit": "scaling laws from the table of a sweep, with intervals and figures",
    "advise": "latents, tokens, learning rate and error for a budget, by the laws of a fit",
    "verify": "check every byte of an activation set",
    "demo": "all of the above on the bundled language model, offline, in minutes",
}


RESUMING = ("harvest", "train", "sweep", "collect", "explain", "demo")


def usage() -> str:
    """The commands, a line each."""
    lines = "\n".join(f"  {name:10} {what}" for name, what in COMMANDS.items())
    return (
        "usage: sae-jax COMMAND [RECIPE.yaml] [--key=value ...]\n\n"
        f"Sparse autoencoders on language-model activations, from text to a page to look at.\n\n{lines}\n\n"
        "Exit codes: 0 done, or saved and stopped by SIGTERM (train, sweep); 1 failed; 2 wrong argument; 3 done in\n"
        "part, as a sweep of which some members failed; 4 another process took over; 130 Ctrl-C; 143 SIGTERM.\n\n"
        "`sae-jax COMMAND --help` lists a command's options, `sae-jax --version` says which version this is."
    )
