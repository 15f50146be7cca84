"""Language models that transformers runs in torch, for architectures that families/ does not have.

A hook is the name of a module, `model.layers.5.mlp`, and stands for its output, or the first of its outputs. Where the
family is one of families/, `point.layer` names the same place as there. Activations are read and replaced by forward
hooks; there are no gradients. torch and transformers are imported when a model is loaded.

Arrays cross between JAX and torch by dlpack: they share memory where both are on the same kind of device.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sae_jax import storage
from sae_jax.lm import redrawn
from sae_jax.lm.checkpoint import gguf_of, weight_files
from sae_jax.lm.family import families, family
from sae_jax.lm.hooks import POINTS
from sae_jax.lm.model import locate
from sae_jax.progress import say_once
from sae_jax.types import UsageError, UserError, check_indices

N_NAMED = 3  # modules or tensors that a message names
# A norm reads it, so it can be read there; the stream that goes on is not what that norm is given.
_READ_ALONE = "resid_mid"

Tensor = Any  # of torch, which may not be installed
Tap = Callable[[Tensor], Tensor | None]  # what is to be in the place of [B, T, D]; None: what is there


@dataclasses.dataclass(frozen=True)
class TorchSpec:
    """What a harvest has to know of a model."""

    family: str  # the `model_type` of config.json
    n_vocab: int
    n_context: int | None  # the longest sequence; None: config.json does not say


class TorchModel:
    """A causal language model of transformers, in torch's memory."""

    def __init__(self, module: Any, reference: str, digest: str) -> None:
        """`module`: what AutoModelForCausalLM gives; `digest`: of its config.json and weight files, sha256 in hex."""
        config = module.config.get_text_config()
        self.reference, self.digest = reference, digest
        self.spec = TorchSpec(
            family=module.config.model_type,
            n_vocab=module.get_input_embeddings().weight.shape[0],
            n_context=getattr(config, "max_position_embeddings", None),
        )
        self._module = module
        self._modules = {name: part for name, part in module.named_modules() if name}

    def __repr__(self) -> str:
        n_parameters = sum(parameter.numel() for parameter in self._module.parameters())
        return f"TorchModel {self.reference}: {self.spec.family}, {n_parameters:,} parameters, on {self._module.device}"

    def check_hook(self, hook: str) -> str:
        """`hook` itself; UsageError, with near names, if this model does not have it."""
        self._place(hook)
        return hook

    def widths(self, hooks: Sequence[str], n_tokens: int) -> dict[str, int]:
        """{hook: numbers per token}, from a trial on sequences of `n_tokens`.

        Raises UsageError for a module that does not run once in a forward pass, or does not return [B, T, D], and
        UserError where the model cannot run on so many tokens.
        """
        found: dict[str, list[int]] = {hook: [] for hook in hooks}
        n_sequences = 3 if n_tokens == 2 else 2  # the axes have to be told apart
        taps: dict[str, Tap] = {hook: lambda x_BTD, hook=hook: found[hook].append(x_BTD.shape[-1]) for hook in hooks}
        self._run(np.zeros((n_sequences, n_tokens), np.int32), taps)
        for hook, widths in found.items():
            if len(widths) != 1:
                raise UsageError(
                    f"hook {hook!r}: its module runs {len(widths)} times in a forward pass of {self.reference}, not "
                    f"once; name another module"
                )
        return {hook: width for hook, (width,) in found.items()}

    def read(self, ids_BT: Any, hooks: Sequence[str], dtype: str) -> tuple[dict[str, jax.Array], jax.Array]:
        """Activations {hook: dtype[B, T, D]} and their norms f32[B, T, S], where torch has them.

        `ids_BT`: i32, of numpy or JAX. The model runs no further than to the last hook. UserError as `run`.
        """
        import torch  # pyrefly: ignore[missing-import]

        acts: dict[str, Tensor] = {}

        def take(hook: str, x_BTD: Tensor) -> None:
            acts[hook] = x_BTD.clone()  # a later module may write to it
            if len(acts) == len(hooks):
                raise _AllRead

        with contextlib.suppress(_AllRead):
            self._run(ids_BT, {hook: lambda x_BTD, hook=hook: take(hook, x_BTD) for hook in hooks})
        norm_BTS = torch.stack([torch.linalg.vector_norm(acts[hook].float(), dim=-1) for hook in hooks], -1)
        return {hook: _to_jax(acts[hook].to(getattr(torch, dtype))) for hook in hooks}, _to_jax(norm_BTS)

    def run(self, ids_BT: Any, hooks: Sequence[str]) -> tuple[dict[str, jax.Array], jax.Array]:
        """(activations {hook: [B, T, D]}, logits f32[B, T, V]), on JAX's first device.

        UserError for ids beyond the embedding, and where the model cannot run on so many tokens.
        """
        acts: dict[str, Tensor] = {}
        taps: dict[str, Tap] = {hook: lambda x, hook=hook: acts.update({hook: x.clone()}) for hook in hooks}
        logits_BTV = self._run(ids_BT, taps)
        return {hook: _placed(x) for hook, x in acts.items()}, _placed(logits_BTV.float())

    def run_with(self, ids_BT: Any, keep_BT: Any, values: Mapping[str, jax.Array]) -> jax.Array:
        """Logits f32[B, T, V] with {hook: f32[B, T, D]} in the place of the activations where `keep_BT`, bool, is True.

        UserError as `run`.
        """
        import torch  # pyrefly: ignore[missing-import]

        keep_BT1 = torch.from_numpy(np.array(keep_BT)).to(self._module.device)[..., None]

        def put(hook: str, x_BTD: Tensor) -> Tensor:
            return torch.where(keep_BT1, _to_torch(values[hook], self._module.device).to(x_BTD.dtype), x_BTD)

        return _placed(self._run(ids_BT, {hook: lambda x, hook=hook: put(hook, x) for hook in values}).float())

    def _run(self, ids_BT: Any, taps: Mapping[str, Tap]) -> Tensor:
        """Logits [B, T, V] of one forward pass, in which each tap sees the activations of its hook."""
        import torch  # pyrefly: ignore[missing-import]

        ids_BT = np.array(ids_BT, np.int64)
        cure = f"the embedding has {self.spec.n_vocab} rows; use the model whose tokens these are"
        check_indices(ids_BT, self.spec.n_vocab, "token id", cure)
        with contextlib.ExitStack() as attached, torch.no_grad():
            for hook, tap in taps.items():
                attached.callback(self._attach(hook, tap, ids_BT.shape).remove)
            try:
                return self._module(input_ids=torch.from_numpy(ids_BT).to(self._module.device), use_cache=False).logits
            except (UserError, _AllRead):
                raise
            except Exception as error:  # whatever its author raises, and torch for memory or an index
                n, n_tokens = ids_BT.shape
                raise UserError(
                    f"{self.reference} fails on {n} sequences of {n_tokens} tokens ({storage.one_line(error)}); use "
                    f"shorter ones, or fewer tokens at once"
                ) from error

    def _attach(self, hook: str, tap: Tap, shape: tuple[int, int]) -> Any:
        """The handle of a forward hook of torch that gives a tap what is at `hook`, and puts back what it returns."""
        module, is_input = self._place(hook)

        def checked(x: Any) -> Tensor:
            if not (hasattr(x, "is_floating_point") and x.is_floating_point() and tuple(x.shape[:-1]) == shape):
                what = f"{x.dtype}{list(x.shape)}" if hasattr(x, "shape") else type(x).__name__
                raise UsageError(
                    f"hook {hook!r} of {self.reference} gives {what} for {shape[0]} sequences of {shape[1]} tokens; "
                    f"rows need floats[{shape[0]}, {shape[1]}, width]: name another module"
                )
            return x

        def at_input(_: Any, inputs: tuple) -> tuple | None:
            new = tap(checked(inputs[0] if inputs else None))
            return None if new is None else (new, *inputs[1:])

        def at_output(_: Any, __: Any, output: Any) -> Any:
            is_first = isinstance(output, tuple)
            new = tap(checked(output[0] if is_first else output))
            return (new, *output[1:]) if is_first and new is not None else new

        return module.register_forward_pre_hook(at_input) if is_input else module.register_forward_hook(at_output)

    def _place(self, hook: str) -> tuple[Any, bool]:
        """(module, whether its input is meant) of a hook. UsageError if there is none."""
        if hook in self._modules:
            return self._modules[hook], False
        point, _, layer = hook.rpartition(".")
        if point in POINTS and layer.isdecimal():
            return self._place_of_point(hook, point, layer)
        near = difflib.get_close_matches(hook, self._modules, n=N_NAMED, cutoff=0.0)
        raise UsageError(f"{self.reference} has no module {hook!r}; near it are {', '.join(near)}")

    def _place_of_point(self, hook: str, point: str, layer: str) -> tuple[Any, bool]:
        of_family = family(self.spec.family).modules if self.spec.family in families() else {}
        name, _, is_input = of_family.get(point, "").format(layer=layer).partition(" ")
        if name in self._modules and point != _READ_ALONE:
            return self._modules[name], bool(is_input)
        blocks = [name for name in self._modules if name.rpartition(".")[2] == layer]
        block = min(blocks, key=lambda name: name.count("."), default="")
        cure = f"name a module, such as {block} for the block" if block else f"it has no layer {layer}"
        raise UsageError(
            f"hook {hook!r} is the output of no module that is known of {self.reference} ({self.spec.family}); {cure}"
        )


class _AllRead(Exception):  # noqa: N818
    """Nothing is asked of the rest of a forward pass."""


@dataclasses.dataclass(frozen=True)
class TorchSite:
    """A torch model on a batch of S sequences, ready to run with other activations at its hooks: see ReplacedSite."""

    model: TorchModel
    ids: jax.Array  # i32[S, T]
    keep: jax.Array  # bool[S, T]: positions that rows are put in at
    acts: Mapping[str, jax.Array]  # [S, T, D]
    logits: jax.Array  # f32[S, T, V]
    hooks: tuple[str, ...]  # side by side in rows, in this order

    @property
    def rows(self) -> jax.Array:
        """The activations, f32[S * T, X]."""
        rows_STX = jnp.concatenate([self.acts[hook].astype(jnp.float32) for hook in self.hooks], axis=-1)
        return rows_STX.reshape(self.ids.size, -1)

    def with_rows(self, rows_BX: jax.Array) -> jax.Array:
        """Logits f32[S, T, V] with rows f32[S * T, X] in the place of the activations, where `keep` says so."""
        ends = np.cumsum([self.acts[hook].shape[-1] for hook in self.hooks])
        parts = jnp.split(rows_BX.reshape(*self.ids.shape, -1), ends[:-1], axis=-1)
        return self.model.run_with(self.ids, self.keep, dict(zip(self.hooks, parts, strict=True)))


def load_torch(reference: str, precision: str = "float32", *, recorded: bool = False) -> TorchModel:
    """The model that `reference` names as transformers loads it, on a GPU if torch sees one, else on the CPU.

    Args:
        reference: `bundled`, a folder, or hub-id[@revision]. Code that comes with a model is not run.
        precision: of the parameters and products, float32 or bfloat16.
        recorded: it is what `lm.resolve` made of a reference.

    Raises UsageError where torch is not installed, and UserError for a model that transformers cannot load whole.
    """
    try:
        import torch  # pyrefly: ignore[missing-import]
        import transformers
    except ImportError as error:
        raise UsageError(f"harvest.backend=torch needs torch ({error}); pip install 'sae_jax[torch]'") from None
    if redrawn.parted(reference)[1] is not None:
        raise UsageError(f"{reference}: random weights are for models that JAX runs; leave out harvest.backend=torch")
    folder = locate(reference, recorded=recorded)
    if gguf_of(folder) is not None:
        raise UsageError(f"{reference} is a .gguf file, which harvest.backend=torch does not read; leave it out")
    digest = _digest(folder)
    try:
        with _quiet(transformers):
            module, said = transformers.AutoModelForCausalLM.from_pretrained(
                folder,
                dtype=getattr(torch, precision),
                local_files_only=True,
                trust_remote_code=False,
                output_loading_info=True,
            )
        module = module.eval().to("cuda" if torch.cuda.is_available() else "cpu")
    except Exception as error:  # of any kind: each architecture and each format has its own
        raise UserError(
            f"transformers {transformers.__version__} cannot load {reference} ({storage.one_line(error)}); update it, "
            f"or write activations of your own with sae_jax.write_activations"
        ) from error
    if missing := sorted(said["missing_keys"]):
        raise UserError(
            f"{folder} has no tensor {missing[0]!r}{_and_more(missing[1:])}, without which transformers would make up "
            f"weights; its weights and config.json do not match"
        )
    if unused := sorted(said["unexpected_keys"]):
        say_once(f"{folder}: tensors that are not used: {', '.join(unused[:N_NAMED])}{_and_more(unused[N_NAMED:])}")
    return TorchModel(module, reference, digest)


def _digest(folder: Path) -> str:
    """sha256 (hex) of config.json and of the weight files. UserError where one is not there."""
    if not (folder / "config.json").exists():
        raise UserError(f"{folder} has no config.json; a model is a Hugging Face folder")
    sha = hashlib.sha256()
    for path in (folder / "config.json", *weight_files(folder)):
        with path.open("rb") as file:
            while block := file.read(1 << 22):
                sha.update(block)
    return sha.hexdigest()


def _and_more(names: Sequence[str]) -> str:
    return f" and {len(names)} more" if names else ""


@contextlib.contextmanager
def _quiet(transformers: Any) -> Iterator[None]:
    """Without its progress bars and reports; what matters in them we say ourselves."""
    logging = transformers.utils.logging
    verbosity, shows_bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if shows_bars:
            logging.enable_progress_bar()


def _to_jax(x: Tensor) -> jax.Array:
    """The same memory, where JAX knows the device; else a copy on the host."""
    return jax.dlpack.from_dlpack((x if jax.default_backend() == "gpu" else x.cpu()).contiguous())


def _placed(x: Tensor) -> jax.Array:
    """On the device that JAX computes on."""
    return jax.device_put(_to_jax(x), jax.local_devices()[0])


def _to_torch(x: jax.Array, device: Any) -> Tensor:
    """A tensor on `device`: the same memory, where JAX computes there, too."""
    import torch  # pyrefly: ignore[missing-import]

    kinds = {"gpu": "cuda", "cpu": "cpu"}
    is_there = kinds.get(jax.default_backend()) == device.type
    return torch.from_dlpack(x).to(device) if is_there else torch.from_numpy(np.array(x)).to(device)
