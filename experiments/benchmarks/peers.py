"""The training loops of other libraries, each its own code, fed with our batches and stopped between steps.

A process of its own serves one trainer (`serve`): it reads orders from standard input, one JSON object a line, and
answers with one. Between orders the trainer hangs in the iterator that it takes its batches from, so the time between
batches is that of whole steps of that library, bookkeeping included. Batches lie in the memory of the device, a GPU if
torch sees one, as float32 before the clock starts: a peer pays nothing for input.

Changed in all settings: the learning rate is ours and constant, the optimiser is Adam. Changed in the fast ones: Adam
is torch's fused one, the forward pass runs under bfloat16 autocast, gradients are not clipped.

A task with `own_steps` changes nothing of that: the trainer keeps its own optimiser and schedule, and its own rate if
`lr` is None. dictionary-learning, which refuses a run that is shorter than its warm-up, then warms up over a tenth of
those steps.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from itertools import islice
from types import SimpleNamespace
from typing import Any, NoReturn

import common
import numpy as np
import torch

from sae_jax import open_activations
from sae_jax.activations.loader import Loader

FOREVER = 10**9
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

# What is switched on in each setting. torch.compile refuses what the nnsight that dictionary-learning pins makes of
# tensors; the sparse activations that SAELens offers have no gradient on a CPU.
SETTINGS = {
    "eai-sparsify": {
        "default": "",
        "fast": "fused bf16",
        "fast, float32": "fused",
        "fast, compiled": "fused bf16 compile",
    },
    "dictionary-learning": {"default": "", "fast": "fused bf16", "fast, float32": "fused"},
    "sae-lens": {"default": "", "fast": "fused bf16", "fast, float32": "fused", "fast, compiled": "fused bf16 compile"},
}


class FusedAdam(torch.optim.Adam):
    def __init__(self, *arguments: Any, **settings: Any) -> None:
        super().__init__(*arguments, **settings, fused=True)


class Orders:
    """Takes orders while the trainer waits for a batch: {"steps": n} trains, {"fvu" or "codes": path} measures."""

    def __init__(self, data: str, batch_size: int, seed: int) -> None:
        activations = open_activations(data)
        self._site = activations.sources[0]
        self._d = activations.source(self._site).d
        self._loader = Loader(activations, (self._site,), batch_size, seed=seed)
        self._batches = self._loader.batches()
        self._answers = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)  # what the libraries print is not an answer
        self.reconstruct: Callable[[torch.Tensor], torch.Tensor]
        self.active: Callable[[torch.Tensor], torch.Tensor]  # bool[B, F]: which latents
        self.before_measuring: Callable[[], Any] = lambda: None

    def __iter__(self) -> Iterator[torch.Tensor]:
        for line in sys.stdin:
            order = json.loads(line)
            if "steps" in order:
                taken = islice(self._batches, order["steps"])
                batches = [torch.from_numpy(rows[self._site].astype(np.float32)).to(DEVICE) for _, rows in taken]
                seconds = []
                for first in range(0, len(batches), common.STEPS_TIMED):
                    timed = batches[first : first + common.STEPS_TIMED]
                    began = _now()
                    yield from timed
                    seconds.append((_now() - began) / len(timed))
                self._answer(seconds=seconds)
                continue
            self.before_measuring()
            if "fvu" in order:
                self._answer(fvu=self._fvu(np.load(order["fvu"])))
            else:
                self._answer(**self._codes(np.load(order["codes"])))
        self._loader.close()
        os._exit(0)  # the loop around this would save what it has

    def _fvu(self, x_BD: np.ndarray) -> float:
        with torch.no_grad():
            blocks = [self.reconstruct(rows.to(DEVICE)).float().cpu() for rows in torch.from_numpy(x_BD).split(1024)]
        return common.fvu(x_BD, torch.cat(blocks).numpy())

    def _codes(self, x_BD: np.ndarray) -> dict[str, float]:
        """Active latents a row, and the share of latents that are active on none."""
        with torch.no_grad():
            active = [self.active(rows.to(DEVICE)) for rows in torch.from_numpy(x_BD).split(1024)]
        l0 = sum(float(block.sum()) for block in active) / len(x_BD)
        fired_F = torch.stack([block.any(0) for block in active]).any(0)
        return {"l0": l0, "silent": float((~fired_F).float().mean())}

    def _answer(self, **facts: Any) -> None:
        self._answers.write(json.dumps(facts) + "\n")
        self._answers.flush()


def _now() -> float:
    """When all that was begun is done."""
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def serve(task: str) -> NoReturn:
    """Train as `task` says until standard input ends; JSON: peer, options, data, d, n_latents, k, batch_size, lr.

    And, if not 0: seed; own_steps, see the head of this file.
    """
    config = SimpleNamespace(**{"seed": 0, "own_steps": 0, **json.loads(task)})
    options = config.options.split()
    torch.manual_seed(config.seed)
    if "fused" in options:
        torch.optim.Adam = FusedAdam
        torch.nn.utils.clip_grad_norm_ = lambda *_: None
    autocast = torch.autocast(DEVICE, torch.bfloat16, enabled="bf16" in options)
    compiled = torch.compile if "compile" in options else lambda function: function
    orders = Orders(config.data, config.batch_size, config.seed)
    train = {"eai-sparsify": _eai_sparsify, "dictionary-learning": _dictionary_learning, "sae-lens": _sae_lens}
    train[config.peer](config, options, orders, autocast, compiled)
    raise AssertionError("the trainer ended by itself")


def _eai_sparsify(config, options, orders, autocast, compiled) -> None:
    """`Trainer.fit` on a model whose only layer gives the rows of the batch."""
    if DEVICE == "cpu":  # where Triton is installed, its kernels would be taken, and fail
        os.environ["SPARSIFY_DISABLE_TRITON"] = "1"
    from sparsify import SparseCoderConfig, TrainConfig, Trainer

    class Rows(torch.nn.Module):
        device = torch.device(DEVICE)
        dummy_inputs = {"input_ids": torch.zeros(1, 1, dtype=torch.long)}  # noqa: RUF012
        rows = torch.zeros(1, config.d, device=DEVICE)

        def __init__(self) -> None:
            super().__init__()
            self.site = torch.nn.Identity()

        @property
        def base_model(self) -> torch.nn.Module:
            return self

        def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
            return self.site(self.rows[None])

    class Dataset:
        """One sequence a batch: its tokens say nothing, its rows go into the model."""

        batches = iter(orders)

        def __len__(self) -> int:
            return FOREVER

        def __getitem__(self, _: int) -> dict[str, torch.Tensor]:
            model.rows = next(self.batches)
            return {"input_ids": torch.zeros(len(model.rows), dtype=torch.long)}

    model = Rows()
    sae = SparseCoderConfig(num_latents=config.n_latents, k=config.k)
    optimiser = {} if config.own_steps else {"optimizer": "adam"}
    settings = TrainConfig(
        sae,
        batch_size=1,
        lr=config.lr,
        hookpoints=["site"],
        init_seeds=[config.seed],
        save_every=FOREVER,
        log_to_wandb=False,
        **optimiser,
    )
    trainer = Trainer(settings, Dataset(), model)
    trainer.lr_schedulers = []  # of Adam; there are none by default
    coder = trainer.saes["site"]
    plain = coder.forward
    orders.reconstruct = lambda x: plain(x).sae_out
    orders.active = lambda x: _at(coder.encode(x), config.n_latents)
    if config.own_steps:  # what it saves are the averages of its schedule-free optimiser
        orders.before_measuring = lambda: [optimizer.eval() for optimizer in trainer.optimizers]
    coder.forward = autocast(compiled(plain))
    trainer.fit()


def _dictionary_learning(config, options, orders, autocast, _) -> None:
    """`TopKTrainer.update`, as `trainSAE` calls it, under autocast as that has it for CUDA."""
    from dictionary_learning.trainers.top_k import TopKTrainer

    trainer = TopKTrainer(
        steps=FOREVER,
        activation_dim=config.d,
        dict_size=config.n_latents,
        k=config.k,
        layer=0,
        lm_name="none",
        lr=config.lr,
        warmup_steps=min(1000, config.own_steps // 10),
        seed=config.seed,
        device=DEVICE,
    )
    orders.reconstruct = trainer.ae.forward
    orders.active = lambda x: trainer.ae.encode(x) > 0
    for step, batch in enumerate(orders):
        with autocast:
            trainer.update(step, batch)


def _sae_lens(config, options, orders, autocast, compiled) -> None:
    """`SAETrainer.fit`; autocast is an option of its own."""
    from sae_lens.config import LoggingConfig, SAETrainerConfig
    from sae_lens.saes.topk_sae import TopKTrainingSAE, TopKTrainingSAEConfig
    from sae_lens.training import sae_trainer

    sae = TopKTrainingSAE(TopKTrainingSAEConfig(d_in=config.d, d_sae=config.n_latents, k=config.k, device=DEVICE))
    settings = SAETrainerConfig(
        total_training_samples=FOREVER,
        train_batch_size_samples=config.batch_size,
        **({} if config.lr is None else {"lr": config.lr}),
        lr_end=config.lr or SAETrainerConfig.lr,  # of schedules that are not constant; it has to be there
        device=DEVICE,
        autocast="bf16" in options,
        logger=LoggingConfig(log_to_wandb=False),
    )
    orders.reconstruct = sae.forward
    orders.active = lambda x: sae.encode(x) > 0
    sae.training_forward_pass = compiled(sae.training_forward_pass)
    sae_trainer.SAETrainer(settings, sae, iter(orders)).fit()


def _at(code, n_latents: int) -> torch.Tensor:
    """bool[B, F] of the active latents of a code that lists the strongest."""
    active = torch.zeros(len(code.top_acts), n_latents, dtype=torch.bool, device=code.top_acts.device)
    return active.scatter_(1, code.top_indices, code.top_acts > 0)
