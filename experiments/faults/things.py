"""What a user can bring, made small, and every reader of it: what the fuzzers damage, and how it is read."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import tokenizers

import sae_jax
from sae_jax import config, lm, planning, recipe, runs, storage
from sae_jax.activations import text as texts
from sae_jax.activations.spec import SetSpec
from sae_jax.activations.verify import verify
from sae_jax.commands.harvest import Harvest
from sae_jax.commands.plan import PARTS, Plan
from sae_jax.evaluation import shards
from sae_jax.lm import hooks, params, weights
from sae_jax.lm.spec import Spec
from sae_jax.planning import targets
from sae_jax.scaling import table
from sae_jax.scaling.advise import advise
from sae_jax.scaling.table import Point
from sae_jax.sweeps import grid, points, run
from sae_jax.sweeps.plan import SweepJob
from sae_jax.training import checkpoint, logs
from sae_jax.training.expand import expand_members
from sae_jax.training.run import TrainJob

ROOT = Path(__file__).parents[2]
SMALL = {"n_latents": 32, "k": 4, "dtype": "float32", "batch_size": 64, "log_every": 1}
TEXTS = ["def f(x):\n    return x + 1\n", "Größe 中文 \U0001f600 <s> end"] * 20


class Reader(NamedTuple):
    """What reads one of the things."""

    thing: str
    files: tuple[str, ...]  # patterns: those that are damaged
    read: Callable[[Path], Any]  # of the folder of the thing


def made(folder: Path, readers: Iterable[str]) -> None:
    """The things of these readers, each in a folder of its own."""
    # Programs that run a few steps are not worth optimising.
    os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")
    for name in dict.fromkeys(READERS[reader].thing for reader in readers):
        if not (folder / name).exists():
            with storage.new_folder(folder / name) as new:
                MAKE[name](new)


def _rows() -> np.ndarray:
    return np.random.default_rng(0).standard_normal((256, 8)).astype(np.float32)


def _set(folder: Path) -> None:
    _into(folder, lambda path: sae_jax.write_activations(path, _rows(), dtype="float32"))


def _text_set(folder: Path) -> None:
    with tempfile.TemporaryDirectory() as beside:
        _model(0)(Path(beside))
        _texts(Path(beside))
        text = {"text": f"{beside}/t.txt", "heldout": f"{beside}/t.jsonl", "hooks": ("resid_post.0",)}
        _into(folder, lambda path: sae_jax.harvest(path, model=beside, tokens=128, context=16, **text))


def _run(folder: Path) -> None:
    _into(folder, lambda path: sae_jax.train(_rows(), out=path, steps=2, checkpoint_every=2, **SMALL))


def _dictionary(folder: Path) -> None:
    _into(folder, sae_jax.train(_rows(), steps=1, **SMALL).save)


def _members(folder: Path) -> None:
    members = {"a": {"k": 2}, "b": {"k": 4}}
    _into(folder, lambda path: sae_jax.train_members(_rows(), members, out=path, steps=2, **SMALL))


def _sweep(folder: Path) -> None:
    settings = {"grid": {"k": [2, 4]}, "tokens": (128, 256), "held_out": 128}
    _into(folder, lambda path: sae_jax.sweep(_rows(), out=path, **settings, **SMALL))


def _into(folder: Path, make: Callable[[Path], Any]) -> None:
    """Something that is made where nothing is yet, moved to where there is a folder."""
    make(folder / "made")
    for path in (folder / "made").iterdir():
        path.rename(folder / path.name)
    (folder / "made").rmdir()


def _laws(folder: Path) -> None:
    table.write(folder, _points())
    runs.fit(folder)


def _sums(folder: Path) -> None:
    shards.write(folder, (0, 1), {"fvu": {"n": np.ones(3), "sum": np.ones((2, 3), np.float32)}}, {"tokens": 5})


def _recipe(folder: Path) -> None:
    (folder / "recipe.yaml").write_text(RECIPE)


def _arrays(folder: Path) -> None:
    for name, array in {"rows": _rows(), "tokens": np.arange(256).reshape(32, 8)}.items():
        np.save(folder / f"{name}.npy", array)


RECIPE = """
harvest: {model: bundled, text: stdlib, hooks: [resid_post.2], context: 128, tokens: 2_000_000}
site: resid_post.2
mesh: {latent: 2}
sae: {variant: topk, n_latents: 64, k: 4, dtype: float32}
train: {steps: 10, batch_size: 64, lr: 1e-3}
members: [{name: a, sae: {k: 2}}, {name: b, train: {lr: 0.01}}]
sweep: {grid: {sae.k: [2, 4], train.lr: [1e-3, 3e-3]}, tokens: [128, 256], held_out: 128}
"""
WORDS = {
    "target": "v5p:8x8x8\nh200:64\nv6e:16x16\nrtx4090:1",
    "hook": "resid_post.0\nmlp_out.0\nattn_out.0\nz.0\nembed",
    "share": "0/4\n3/4",
    "grid": "sae.k=2 4\ntrain.lr=1e-3 3e-3\nsae.variant=topk relu",
    "members": "a --sae.k=2\nb --train.lr=0.1 --sae.variant=relu",
    "flags": "--sae.k=4\n--sae.n-latents=64\n--train.lr=1e-3\n--train.steps=5\n--mesh.latent=2\n--site=a\n--site b",
    "model": "bundled\na/b@main\n./x\ngpt2",
    "text": "stdlib\nhf:a/b@main:train\n./x/*.txt\nheldout",
}


def _words(folder: Path) -> None:
    for name, text in WORDS.items():
        (folder / name).write_text(text)


def _points() -> Iterator[Point]:
    """Of a law in which the best width of a budget lies between others."""
    for n, tokens in itertools.product((16, 64, 256, 1024, 4096), (1e4, 4e4, 16e4, 64e4, 256e4)):
        point = {"n_latents": n, "k": 4, "lr": 1e-3, "seed": 0, "tokens": int(tokens), "d_model": 8}
        yield Point.from_json({**point, "flops": 12.0 * n * 8 * tokens, "fvu": 0.1 + n**-0.5 + 20 * tokens**-0.5})


def _texts(folder: Path) -> None:
    records = [{"text": text, "n": n} for n, text in enumerate(TEXTS)]
    lines = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    (folder / "t.txt").write_text("".join(TEXTS))
    (folder / "t.jsonl").write_text(lines)
    (folder / "t.json").write_text(json.dumps(records))
    (folder / "lines.json").write_text(lines)


def _model(i: int) -> Callable[[Path], None]:
    """A model with one of three kinds of tokenizer, the last in two files of weights."""
    from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

    special = ["<s>", "</s>", "<unk>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    model: Any = (models.BPE(), models.WordPiece(unk_token="<unk>"), models.Unigram())[i]
    trainer: Any = (
        trainers.BpeTrainer(vocab_size=300, special_tokens=special, initial_alphabet=alphabet),
        trainers.WordPieceTrainer(vocab_size=120, special_tokens=special),
        trainers.UnigramTrainer(vocab_size=120, special_tokens=special, unk_token="<unk>"),
    )[i]
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = (pre_tokenizers.ByteLevel(), pre_tokenizers.Whitespace(), pre_tokenizers.Metaspace())[i]
    tokenizer.decoder = (decoders.ByteLevel(), decoders.WordPiece(), decoders.Metaspace())[i]
    if i:
        tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace("\t", " ")])
    tokenizer.train_from_iterator(TEXTS, trainer)

    def make(folder: Path) -> None:
        spec = Spec("gpt2", 1, 8, 2, 4, 16, tokenizer.get_vocab_size(), 16)
        weights.save(
            folder, spec, params.init(spec, jax.random.key(0)), settings={"bos_token_id": 0, "eos_token_id": [1]}
        )
        tokenizer.save(str(folder / "tokenizer.json"))
        token = {"content": "<s>", "lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
        token["special"] = True
        files = {
            "tokenizer_config": {"bos_token": token, "eos_token": "</s>", "added_tokens_decoder": {"0": token}},
            "special_tokens_map": {"bos_token": "<s>", "additional_special_tokens": ["<unk>"]},
            "generation_config": {"bos_token_id": 0, "eos_token_id": 1},
        }
        for name, content in files.items():
            (folder / f"{name}.json").write_text(json.dumps(content))
        if i == 2:
            _split(folder)

    return make


def _split(folder: Path) -> None:
    """The weights in two files with an index."""
    from safetensors.numpy import load_file, save_file

    arrays = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(arrays)
    places = {name: f"model-{i % 2 + 1}-of-2.safetensors" for i, name in enumerate(names)}
    for file in set(places.values()):
        save_file({name: arrays[name] for name in names if places[name] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))


def _of_set(path: Path) -> Any:
    with contextlib.suppress(Exception):  # whoever can write a file can write its digest, too
        spec = storage.as_type(json.loads((path / "dataset.json").read_bytes())["spec"], SetSpec, "")
        (path / "dataset.json").write_text(spec.to_json())
    try:
        activations = sae_jax.open_activations(path)
        for source in activations.sources:
            activations.stats(source)
            for chunk in range(min(activations.n_chunks, 20)):
                activations.read_chunk(source, chunk)
        if activations.spec.has_text:
            activations.read_sequences(activations.read_index(0)["seq"])
    finally:
        verify(path)


def _of_dictionary(path: Path) -> Any:
    d = sae_jax.load(path)
    return repr(d), d.encode(np.ones((1, d.record.widths.x[0]), np.float32)) if sum(d.record.widths.x) == 8 else None


def _of_run(path: Path) -> Any:
    logs.read_metrics(path)
    storage.read_lines(path / "attempts.jsonl")
    checkpoint.latest_step(path)
    return checkpoint.problem(path), _of_dictionary(path)


def _of_members(path: Path) -> Any:
    return [_of_dictionary(path / checkpoint.MEMBERS / name) for name in checkpoint.members(path)]


def _of_sweep(path: Path) -> Any:
    for name in ("k2", "k4"):
        points.read(path, name)
    run._kept_passes(path, {}, (0, 1), is_first=False)
    plan = {"data": "", "sweep": {}, "members": {}}  # another than that in the file, which is refused
    return run._keep_plan(path, plan, "set", is_first=False)


def _of_fit(path: Path) -> Any:
    fit = str(path / "fit.json")
    return advise(1e12, fit), runs.advise(1e15, fit, target="h200:8")


def _of_weights(path: Path) -> Any:
    return lm.load(str(path))


def _of_tokenizer(path: Path) -> Any:
    tokenizer = lm.tokenizer(str(path))
    ids = tokenizer.encode([TEXTS[1]])[0]
    return tokenizer.n_used, tokenizer.decode(ids), tokenizer.tokens(ids), list(tokenizer.parts("a b " * 9))


def _of_text(name: str) -> Callable[[Path], Any]:
    return lambda path: texts.scan(str(path / name)) if name else [*texts.documents(str(path))]


def _of_recipe(path: Path) -> Any:
    words = [str(path / "recipe.yaml"), "--data=set", f"--out={path}/out"]
    recipe.parse(Harvest, [words[0], words[2]], "harvest")
    expand_members(recipe.parse(TrainJob, words, "train"))
    return grid.cells(recipe.parse(SweepJob, words, "sweep").sweep)


def _of_plan(path: Path) -> Any:
    members = expand_members(recipe.parse(Plan, [str(path / "recipe.yaml"), "--target=h200:2", "--d-model=8"], "plan"))
    command = next(iter(members.values()))
    parts = {name: getattr(command, name) for name in PARTS}
    job = planning.from_recipe(members={n: (each.sae, each.train) for n, each in members.items()}, **parts)
    return planning.plan(job)


def _of_words(path: Path) -> Any:
    spec = lm.read_spec("bundled")
    readers: dict[str, Callable[[str], Any]] = {
        "target": targets.parse,
        "hook": lambda word: hooks.parse_hook(word, spec),
        "share": config.share,
        "grid": lambda word: grid.cells(grid.SweepConfig(grid=(word,))),
        "model": lm.resolve,
        "text": texts.resolve,
    }
    lines = {name: (path / name).read_bytes().decode(errors="surrogateescape").split("\n") for name in WORDS}
    changed = next((name for name, text in WORDS.items() if lines[name] != text.split("\n")), "target")
    if changed == "members":
        return expand_members(recipe.parse(TrainJob, ["--data=s", "--out=o", "--members", *lines[changed]], "train"))
    if changed == "flags":
        return recipe.parse(TrainJob, ["--data=s", "--out=o", *" ".join(lines[changed]).split(" ")], "train")
    errors = []
    for line in lines[changed]:
        try:
            readers[changed](line)
        except sae_jax.UserError as error:
            errors.append(error)
    if errors and lines[changed] != WORDS[changed].split("\n"):
        raise errors[0]


def _of_arrays(path: Path) -> Any:
    try:
        rows, tokens = (np.load(path / f"{name}.npy", allow_pickle=False) for name in ("rows", "tokens"))
    except Exception as error:  # numpy's, called by the user
        raise sae_jax.UserError(str(error).partition("\n")[0]) from None
    if rows.nbytes + tokens.nbytes > 1 << 20:
        return
    shutil.rmtree(path / "made", ignore_errors=True)
    rows = rows.reshape(32, 8, 8) if rows.size == 2048 else rows
    return sae_jax.write_activations(path / "made", rows, tokens=tokens)


MAKE: dict[str, Callable[[Path], None]] = {
    "recipe": _recipe,
    "words": _words,
    "set": _set,
    "text set": _text_set,
    "dictionary": _dictionary,
    "run": _run,
    "members": _members,
    "sweep": _sweep,
    "laws": _laws,
    "sums": _sums,
    **{f"model {i}": lambda path, i=i: _model(i)(path) for i in range(3)},
    "texts": _texts,
    "arrays": _arrays,
}
READERS = {
    "recipe": Reader("recipe", ("*",), _of_recipe),
    "plan": Reader("recipe", ("*",), _of_plan),
    "words": Reader("words", ("*",), _of_words),
    "set": Reader("set", ("*.json", "**/*.json", "acts/acts/c/0/*"), _of_set),
    "text set": Reader("text set", ("*.json", "**/*.json", "sequences/c/0/*"), _of_set),
    "dictionary": Reader("dictionary", ("*",), _of_dictionary),
    "run": Reader("run", ("**/*",), _of_run),
    "members": Reader("members", ("*.json", "members/*/*.json"), _of_members),
    "sweep": Reader("sweep", ("sweep.json", "points/*", "passes/*.json"), _of_sweep),
    "table": Reader("laws", ("results.jsonl",), table.read),
    "fit": Reader("laws", ("fit.json",), _of_fit),
    "sums": Reader("sums", ("**/*.npz",), lambda path: shards.merge(path, 1, {"tokens": 5})),
    "weights": Reader("model 0", ("config.json", "*.safetensors"), _of_weights),
    "split weights": Reader("model 2", ("*.index.json", "*.safetensors"), _of_weights),
    "tokenizer": Reader("model 0", ("*token*.json", "generation_config.json", "config.json"), _of_tokenizer),
    "WordPiece": Reader("model 1", ("tokenizer.json",), _of_tokenizer),
    "Unigram": Reader("model 2", ("tokenizer.json",), _of_tokenizer),
    "plain text": Reader("texts", ("t.txt",), _of_text("t.txt")),
    "JSON Lines": Reader("texts", ("t.jsonl",), _of_text("t.jsonl")),
    "JSON": Reader("texts", ("t.json",), _of_text("t.json")),
    "folder of texts": Reader("texts", ("*",), _of_text("")),
    "arrays": Reader("arrays", ("*.npy",), _of_arrays),
}
