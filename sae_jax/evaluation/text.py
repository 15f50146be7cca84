"""The held-out text of an activation set, with the language model that made the set."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import jax
import numpy as np

from sae_jax import lm, mesh
from sae_jax.activations import text as texts
from sae_jax.activations import tokens
from sae_jax.activations.conversations import Conversations
from sae_jax.activations.forward import Hooks, hook_of, read_hooks
from sae_jax.activations.sinks import keep
from sae_jax.activations.store import ActivationSet, open_activations
from sae_jax.lm.chat import first_template
from sae_jax.progress import console, say_once
from sae_jax.record import Record
from sae_jax.storage import Files
from sae_jax.types import Sites, UsageError, UserError


@dataclass(frozen=True, repr=False)
class HeldOut:
    """Text that no row of a set came from, with the model to run it through and the hooks of one site."""

    name: str  # the reference of the text
    model: lm.LanguageModel | lm.TorchModel
    encoded: Hooks  # the sources side by side in what is encoded
    reconstructed: Hooks
    sequences: np.ndarray  # i32[n, T], made as in the set
    text: np.ndarray  # bool[n, T], no special tokens, and of conversations those of the role that the set has rows of
    max_norm_multiple: float | None  # as in the set

    @cached_property
    def tokenizer(self) -> lm.Tokenizer:
        """Of the model."""
        return lm.tokenizer(self.model.reference, self.model.spec.n_vocab, recorded=True)

    def __repr__(self) -> str:
        n, context = self.sequences.shape
        hooks = ", ".join(map(str, dict.fromkeys(self.encoded + self.reconstructed)))
        return f"HeldOut {self.name}: {n} sequences of {context} tokens, {hooks} of {self.model}"

    def keep(self, text_BT: np.ndarray, norm_BTS: np.ndarray) -> np.ndarray:
        """bool[B, T]: what the set would hold, norms compared with the median of these sequences, not of a shard."""
        return keep(text_BT, norm_BTS, self.max_norm_multiple)

    def rows(self) -> np.ndarray:
        """Activations f32[N, X] of what is encoded, at all positions that the set would hold."""
        return np.concatenate(self.rows_of(self.encoded), axis=-1)

    def rows_of(self, hooks: Hooks) -> list[np.ndarray]:
        """Activations f32[N, D] of each hook, at all positions that the set would hold."""
        blocks = []
        for first in range(0, len(self.sequences), 64):
            ids_BT, text_BT = self.sequences[first : first + 64], self.text[first : first + 64]
            acts, norm_BTS = read_hooks(self.model, ids_BT, hooks, "float32")
            keep_BT = self.keep(text_BT, np.asarray(norm_BTS))
            blocks.append([np.asarray(acts[str(hook)])[keep_BT] for hook in hooks])
        return [np.concatenate(parts) for parts in zip(*blocks, strict=True)]


def open_set(record: Record, data: str | None = None) -> ActivationSet:
    """The set at `data`, or else the one that a dictionary was trained on, which may be partial."""
    if data is not None:
        return open_activations(data)
    if record.data is None or record.data.path is None:
        raise UsageError("the dictionary names no activation set that it was trained on; name one with --data")
    files = Files(record.data.path)
    if files.read("dataset.json") is None and not files.keys("commits/"):
        raise UserError(
            f"the activation set {record.data.path}, which the dictionary was trained on, is not there; say where it "
            f"is now with --data"
        )
    activations = open_activations(record.data.path, allow_partial=True)
    of_live_data = f"{activations.spec.sha256}/"  # which had all rows of this set and more (activations/live.py)
    if activations.content != record.data.content and not record.data.content.startswith(of_live_data):
        say_once(f"warning: {activations.path} holds other rows than when the dictionary was trained on it")
    return activations


def held_out(
    activations: ActivationSet,
    sites: Sites,
    n_tokens: int,
    model: str | None = None,
    text: str | None = None,
    another: HeldOut | None = None,
    split: int = 1,
) -> HeldOut | None:
    """Held-out text for sources of a set; None where the set names no text, no model or several.

    Args:
        activations: the set.
        sites: its sources that are encoded and reconstructed.
        n_tokens: how much of the text, at most.
        model: where the language model is now, if not where the set says (a reference that lm.resolve made).
        text: where the held-out text is now (one that activations.text.resolve made).
        another: the same text for another site, whose model is used again if it is the same.
        split: devices that the language model is split over; 1: it lies whole on one.

    Raises UserError where text or model is not there, or not what the set was made with; another one that is named here
    is taken, with a warning.
    """
    spec, sources = activations.spec, [activations.source(name) for name in sites.all]
    reference = sources[0].model and lm.moved(model, sources[0].model)
    hooks = {source.name: source.hook for source in sources if source.hook is not None}
    several = len({source.model for source in sources}) > 1
    heldout = text or spec.heldout
    lacks = {
        "sequences of tokens": spec.context is None,
        "held-out text": heldout is None,
        "model, or several": reference is None or several,
        "hook of its sources": len(hooks) < len(sources),
    }
    if spec.context is None or heldout is None or reference is None or any(lacks.values()):
        if model or text:
            what = next(name for name, is_lacking in lacks.items() if is_lacking)
            raise UsageError(f"{activations.path} names no {what}; --heldout and --model have no use, leave them out")
        return None
    if another is not None and another.model.reference == reference:
        encoded, reconstructed = _hooks(hooks, sites, another.model)
        return replace(another, encoded=encoded, reconstructed=reconstructed)
    loaded = load_model(activations, reference, split)
    tokenizer = lm.tokenizer(reference, loaded.spec.n_vocab, recorded=True)
    if loaded.digest != sources[0].model_digest:
        say_or_refuse(f"the weights of {reference} are not those that {activations.path} was made with", model, "model")
    if spec.tokenizer == sources[0].model and spec.tokenizer_digest not in (None, tokenizer.digest):
        say_or_refuse(
            f"the tokenizer of {reference} is not that which {activations.path} was made with", model, "model"
        )
    files = _check_text(activations, heldout, text)
    chat = _conversations(activations, loaded, tokenizer, model)
    sequenced = tokens.TokenText(
        heldout, tokenizer, spec.context, spec.fields, files, chat, spec.first_token, kind=spec.sequence or "packed"
    )
    ids_NT, text_NT = sequenced.stacked(0, max(n_tokens // spec.context, 1))
    encoded, reconstructed = _hooks(hooks, sites, loaded)
    return HeldOut(
        name=heldout,
        model=loaded,
        encoded=encoded,
        reconstructed=reconstructed,
        sequences=ids_NT,
        text=text_NT,
        max_norm_multiple=spec.max_norm_multiple,
    )


def load_model(activations: ActivationSet, reference: str, split: int) -> lm.LanguageModel | lm.TorchModel:
    """A language model in the precision in which it made a set, over `split` devices of this process."""
    precision, placed = activations.spec.precision or "float32", mesh.one_copy(split)
    if activations.spec.backend != "torch":
        return lm.load(reference, precision, recorded=True, mesh=placed)
    if split > 1:
        raise UsageError(
            f"split={split}: {activations.path} was made with harvest.backend=torch, which runs a model whole; use 1"
        )
    return lm.load_torch(reference, precision, recorded=True)


def _conversations(
    activations: ActivationSet,
    model: lm.LanguageModel | lm.TorchModel,
    tokenizer: lm.Tokenizer,
    given: str | None,
) -> Conversations | None:
    """What makes tokens of held-out conversations: the chat template of the set. None for other text."""
    spec = activations.spec
    if spec.chat is None:
        return None
    others = [source.model for source in spec.sources if source.model is not None and given is None]
    template = first_template(list(dict.fromkeys([*others, model.reference])))
    if template.digest != spec.chat_template_digest:
        what = f"the chat template of {template.name} is not that which {activations.path} was made with"
        say_or_refuse(what, given, "model")
    return Conversations(template, tokenizer, spec.chat, model.spec.n_vocab)


def _check_text(activations: ActivationSet, heldout: str, given: str | None) -> tuple[str, ...]:
    """The files of the held-out text, which has to be there, and to be what the set names."""
    if not texts.is_there(heldout):
        raise UserError(
            f"the held-out text {heldout} is not there; say where it is now with --heldout, or repeat the "
            f"harvest with its new place"
        )
    expected = activations.spec.heldout_digest
    # The digest tells whether what can be read is what the set names, whatever was left out then.
    scanned = texts.scan(heldout, activations.spec.fields, skip_unreadable=expected is not None)
    if expected is not None and scanned.digest != expected:
        say_or_refuse(f"{heldout} is not the held-out text that {activations.path} was made with", given, "heldout")
    return scanned.files


def say_or_refuse(difference: str, given: str | None, flag: str) -> None:
    """What differs from the record of a set is taken, with a warning, if the user names it; else UserError."""
    if given is None:
        raise UserError(f"{difference}; name it with --{flag} to use it all the same")
    say_once(f"warning: {difference}")


def _hooks(hooks: dict[str, str], sites: Sites, model: lm.LanguageModel | lm.TorchModel) -> tuple[Hooks, Hooks]:
    """Hooks of what is encoded and of what is reconstructed."""
    encoded, reconstructed = (tuple(hook_of(hooks[name], model) for name in names) for names in sites)
    return encoded, reconstructed


def unseen_rows(activations: ActivationSet, sites: Sites, n_rows: int, split: int = 1) -> dict[str, np.ndarray]:
    """{source: f32[N, D]} of held-out text, up to `n_rows`; rows of the set itself if it names no text.

    The language model lies over `split` devices meanwhile.
    """
    text = held_out(activations, sites, n_rows, split=split)
    if text:
        hooks = dict(zip(sites.x + sites.y, text.encoded + text.reconstructed, strict=True))
        return dict(zip(hooks, text.rows_of(tuple(hooks.values())), strict=True))
    if jax.process_index() == 0:
        console.print(
            f"{activations.path} names no held-out text: members are measured on rows that they were trained on"
        )
    chunks = spread_chunks(activations, n_rows)
    return {
        name: np.concatenate([activations.read_chunk(name, chunk).astype(np.float32) for chunk in chunks])[:n_rows]
        for name in sites.all
    }


def spread_chunks(activations: ActivationSet, n_rows: int) -> list[int]:
    """Chunks spread evenly over the set, as few as hold `n_rows` rows."""
    n_chunks = min(-(-n_rows // activations.spec.chunk_rows), activations.n_chunks)
    return np.linspace(0, activations.n_chunks - 1, n_chunks).round().astype(int).tolist()
