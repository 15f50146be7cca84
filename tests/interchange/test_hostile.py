"""Broken and hostile input of every format: nothing is run, nothing is left, one line; and memory stays bounded."""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import shutil
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

import sae_jax
from sae_jax import UserError
from sae_jax.interchange import lazy, tensors
from sae_jax.interchange.lazy import Lazy
from sae_jax.interchange.tensors import open_tensors
from sae_jax.storage import tensor_files
from tests.interchange import samples

ODD = (None, -1, 0, 1, 2**31, 2**70, 1.5, 1e308, "", "topk", "../../x", "k" * 3000, [], [[1]], {}, {"k": {}}, True)


def files_of(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file() and not path.is_symlink())


def truncated(path: Path, rng: np.random.Generator) -> None:
    path.write_bytes(path.read_bytes()[: rng.integers(path.stat().st_size)])


def flipped(path: Path, rng: np.random.Generator) -> None:
    data = bytearray(path.read_bytes())
    for place in rng.integers(min(len(data), 2000), size=3):  # where headers are
        data[place] = rng.integers(256)
    path.write_bytes(data)


def overwritten(path: Path, rng: np.random.Generator) -> None:
    path.write_bytes(rng.bytes(int(rng.integers(1, 400))))


def renamed(path: Path, rng: np.random.Generator) -> None:
    names = ("cfg.json", "config.json", "ae.pt", "sae.safetensors", "params.npz", "layer_1.safetensors", "x.pth")
    path.rename(path.with_name(names[rng.integers(len(names))]))


def replaced_by(path: Path, rng: np.random.Generator) -> None:
    """A link to a device, to nothing, to itself or out of the folder."""
    path.unlink()
    targets = ("/dev/zero", "/nowhere/at/all", path.name, "/etc/os-release", "..", "/dev/stdin")
    path.symlink_to(targets[rng.integers(len(targets))])


def edited(path: Path, rng: np.random.Generator) -> None:
    """A value of the settings."""
    if path.suffix != ".json":
        return flipped(path, rng)
    content = json.loads(path.read_text())
    below = content
    while True:
        key = sorted(below)[rng.integers(len(below))]
        if isinstance(below[key], dict) and below[key] and rng.random() < 0.8:
            below = below[key]
            continue
        break
    below[key] = ODD[rng.integers(len(ODD))]
    path.write_text(json.dumps(content))


def reshaped(path: Path, rng: np.random.Generator) -> None:
    """An array transposed, of another type, empty, not finite or missing."""
    if path.suffix != ".safetensors":
        return edited(path, rng)
    arrays = load_file(path)
    name = sorted(arrays)[rng.integers(len(arrays))]
    array, what = arrays[name], rng.integers(6)
    if what == 0:
        arrays[name] = np.array(array.T, order="C")
    elif what == 1:
        with np.errstate(invalid="ignore"):
            arrays[name] = array.astype((np.int8, np.bool_, np.int64, np.complex64)[rng.integers(4)])
    elif what == 2:
        arrays[name] = array[..., None] if rng.random() < 0.5 else np.zeros((0, *array.shape[1:]), np.float32)
    elif what == 3:
        arrays[name] = np.where(rng.random(array.shape) < 0.1, (np.nan, np.inf)[rng.integers(2)], array)
    elif what == 4:
        del arrays[name]
    else:
        arrays[f"{name}_"] = array
    save_file(arrays, path)


def huge_header(path: Path, rng: np.random.Generator) -> None:
    if path.suffix == ".safetensors":
        sizes = (2**63 - 1, 2**40, 2**32, 10**8 + 1)
        path.write_bytes(sizes[rng.integers(4)].to_bytes(8, "little") + path.read_bytes()[8:])
    else:
        path.write_bytes(b"[" * 100_000 if rng.random() < 0.5 else b'{"k": ' + b"9" * 5000 + b"}")


class Call:
    """What a pickle would call when it is opened."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


def calling(path: Path, rng: np.random.Generator) -> None:
    """A file of torch that calls something, by the zip or as a bare pickle."""
    content = {"W_enc": np.zeros((2, 2)), "k": Call(path.parent / "MARKER")}
    target = path if path.suffix in (".pt", ".pth") else path.with_name("ae.pt")
    target.unlink(missing_ok=True)  # it may be a link by now, and what is behind it is not ours
    if rng.random() < 0.3:
        target.write_bytes(pickle.dumps(content))
        return
    with zipfile.ZipFile(target, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps(content, 2))
        archive.writestr("../../climbs", b"x")


MUTATIONS: tuple[Callable[[Path, np.random.Generator], None], ...] = (
    *(truncated, flipped, overwritten, renamed, replaced_by, edited, edited, reshaped, reshaped, huge_header, calling),
)


def refusal(path: Path, out: Path, format: str) -> str | None:
    """What an import says instead of importing."""
    try:
        sae_jax.import_dictionary(path, out, format)
    except UserError as error:
        return str(error)
    return None


def fuzz(tmp_path: Path, seed: int, n: int) -> int:
    """Import n mutated samples; how many were refused."""
    rng, names, n_refused = np.random.default_rng(seed), list(samples.SAMPLES), 0
    good = tmp_path / "good"
    made = {name: samples.SAMPLES[name](good / name) for name in names}
    for number in range(n):
        name = names[number % len(names)]
        box = tmp_path / "box"
        shutil.copytree(good / name, box / "theirs")
        for _ in range(rng.integers(1, 3)):
            if files := files_of(box / "theirs"):
                with contextlib.suppress(
                    ValueError, OSError, SafetensorError, RecursionError, TypeError
                ):  # the one before has broken it
                    MUTATIONS[rng.integers(len(MUTATIONS))](files[rng.integers(len(files))], rng)
        path = box / "theirs" / made[name].path.relative_to(good / name)
        before = sorted(each for each in tmp_path.rglob("*"))
        said = refusal(path, box / "ours", "auto" if rng.random() < 0.7 else made[name].format)
        if said is not None:
            n_refused += 1
            assert "\n" not in said
            assert not (box / "ours").exists()
            left = {each.name for each in tmp_path.rglob("*") if each not in before}
            assert left <= {".ours.owner"}, (name, left)
        else:  # what was changed is nothing that the dictionary is made of
            d = sae_jax.load(box / "ours")
            assert all(np.isfinite(leaf).all() for leaf in (d.w_enc, d.w_dec, d.b_enc, d.b_dec))
        assert not list(tmp_path.rglob("MARKER"))
        shutil.rmtree(box)
    return n_refused


def test_broken_files_are_refused_in_one_line(tmp_path: Path) -> None:
    assert fuzz(tmp_path, 0, 250) > 100


@pytest.mark.long
@pytest.mark.timeout(2400)
def test_a_thousand_broken_files(tmp_path: Path) -> None:
    """As many as `make fuzz` says in its environment: ten thousand."""
    n = int(os.environ.get("BROKEN_FILES", "1000"))
    assert fuzz(tmp_path, 1, n) > 0.4 * n


def test_a_pickle_that_calls_is_not_run(tmp_path: Path) -> None:
    sample = samples.dictionary_learning_topk(tmp_path / "theirs")
    calling(sample.path / "ae.pt", np.random.default_rng(1))
    with pytest.raises(UserError, match=r"it wants \S+, which is no tensor of plain numbers"):
        sae_jax.import_dictionary(sample.path, tmp_path / "out")
    assert not list(tmp_path.rglob("MARKER"))


@pytest.mark.parametrize("name", samples.SAMPLES)
def test_no_more_than_a_slab_is_asked_for(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of whatever width: what is in memory at once does not grow with the dictionary."""
    slab, asked = 256, []
    made = Lazy.of_file.__func__  # type: ignore[attr-defined]

    def of_file(cls, path, name, place):
        array = made(cls, path, name, place)

        def read(part):
            asked.append(4 * int(np.prod([p.stop - p.start for p in part])))
            return array.read(part)

        return replace(array, read=read)

    monkeypatch.setattr(lazy, "SLAB_BYTES", slab)
    monkeypatch.setattr(Lazy, "of_file", classmethod(of_file))
    sample = samples.SAMPLES[name](tmp_path / "theirs")
    record = sae_jax.import_dictionary(sample.path, tmp_path / "ours")
    n_imported, slab = len(asked), max(slab, 4 * record.sae["n_latents"])  # a vector is read whole
    assert max(asked) <= slab
    for format in ("saelens", "sparsify", "dictionary_learning"):
        try:
            sae_jax.export(tmp_path / "ours", format, tmp_path / format)
        except UserError:
            continue
        assert len(asked) > n_imported
    assert max(asked) <= slab


@pytest.mark.parametrize("suffix", [".safetensors", ".npz", ".pt"])
def test_strided_arrays_are_written_as_they_look(suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A library's writer puts out the buffer of a transposed array in its own order."""
    monkeypatch.setattr(lazy, "SLAB_BYTES", 512)
    rng = np.random.default_rng(0)
    wide, cube = rng.standard_normal((7, 50)).astype(np.float32), rng.standard_normal((3, 40, 5)).astype(np.float32)
    arrays = {
        "transposed": (Lazy.of(wide).transposed(), wide.T),
        "fortran": (Lazy.of(np.asfortranarray(wide)), wide),
        "every_second": (Lazy.of(wide[:, ::2]), wide[:, ::2]),
        "middle": (Lazy.of(cube), cube),
        "reversed": (Lazy.of(cube).transposed(), cube.T),
        "picked": (Lazy.of(cube).picked(0, 1).transposed(), cube[1].T),
        "part": (Lazy.of(cube).part(1, 3, 30), cube[:, 3:30]),
        "joined": (lazy.side_by_side([Lazy.of(wide), Lazy.of(wide).scaled(2.0)], 1), np.hstack([wide, 2 * wide])),
        "scaled": (Lazy.of(wide).scaled(np.arange(50), 1), wide * np.arange(50, dtype=np.float32)),
        "scalar": (Lazy.of(np.asarray(1.5, np.float32)), np.asarray(1.5, np.float32)),
    }
    path = tmp_path / f"x{suffix}"
    write = {".safetensors": tensors.write_safetensors, ".npz": tensors.write_npz, ".pt": tensors.write_torch}[suffix]
    write(path, {name: array for name, (array, _) in arrays.items()})
    if suffix == ".safetensors":
        read = load_file(path)
    elif suffix == ".npz":
        read = dict(np.load(path))
    else:
        opened = open_tensors(path)
        read = {name: array.array() for name, array in opened.arrays.items()} | opened.values
    for name, (_, expected) in arrays.items():
        np.testing.assert_array_equal(read[name], expected, err_msg=name)
    if suffix == ".pt":
        assert {*tensor_files.torch_places(path)} == {*arrays}


def test_any_part_of_an_array_of_any_strides_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensor_files, "SHORTEST_RUN", 3)
    data = np.arange(1000, dtype=np.float32)
    path = tmp_path / "data"
    path.write_bytes(b"abc" + data.tobytes())
    rng = np.random.default_rng(0)
    for strides in ((60, 6, 1), (1, 6, 60), (6, 1, 60), (60, 1, 6), (2, 20, 200), (100, 10, 2), (0, 6, 1), (1, 1, 1)):
        shape = (3, 8, 5)
        place = tensor_files.Place("F32", shape, strides, 3)
        whole = np.lib.stride_tricks.as_strided(data, shape, [4 * stride for stride in strides])
        for _ in range(10):
            ends = [np.sort(rng.integers(size + 1, size=2)) for size in shape]
            part = tuple(slice(int(start), int(stop)) for start, stop in ends)
            with path.open("rb") as file:
                read = tensor_files.read_part(file.fileno(), place, part)
            np.testing.assert_array_equal(read, whole[part])
        array = Lazy.of_file(path, "x", place)
        np.testing.assert_array_equal(array.array(), whole)


@pytest.mark.parametrize("name", ["saelens_topk_rescaled", "saelens_abstopk"])
def test_a_decoder_that_is_transposed_is_refused_before_its_norms_count(name: str, tmp_path: Path) -> None:
    path = samples.SAMPLES[name](tmp_path / "theirs").path / "sae_weights.safetensors"
    arrays = load_file(path)
    save_file(arrays | {"W_dec": np.ascontiguousarray(arrays["W_dec"].T)}, path)
    with pytest.raises(UserError, match=r"W_dec has 8 rows, and .*: b_enc the shape .* of one dictionary") as caught:
        sae_jax.import_dictionary(path.parent, tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_a_tensor_that_claims_more_than_there_is_is_refused(tmp_path: Path) -> None:
    """One number that stands for a terabyte."""
    path = samples.crosscoder(tmp_path / "theirs").path / "cc_weights.pt"
    with zipfile.ZipFile(path) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    data = entries["archive/data.pkl"]
    assert data.count(b"K\x02K\x08K\x18") == 1  # (2, 8, 24), as pickled
    entries["archive/data.pkl"] = data.replace(b"K\x02K\x08K\x18", b"K\x02K\x08\x8a\x06\0\0\0\0\0\x01")
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in entries.items():
            archive.writestr(name, content)
    with pytest.raises(UserError, match=r"a tensor reaches beyond its storage|a tensor is larger than its storage"):
        sae_jax.import_dictionary(path.parent, tmp_path / "out")


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda cfg: cfg.pop("k"), "lacks k, without which nothing can be computed"),
        (lambda cfg: cfg.update(k=4.0), "cfg.json: k: Expected `int`, got `float`"),
        (lambda cfg: cfg.update(k=99), "sae.k=99 must be between 1 and sae.n_latents=24"),
        (lambda cfg: cfg.update(d_sae=25), "W_enc has shape .8, 24., and cfg.json says d_sae 25"),
        (lambda cfg: cfg.update(d_in=9), r"makes w_enc .24, 8., and its settings make it .24, 9."),
        (
            lambda cfg: cfg.update(architecture="matching_pursuit"),
            "architecture 'matching_pursuit' is none that a variant here computes",
        ),
        (lambda cfg: cfg.update(architecture="temporal"), "those are topk, abstopk, standard, jumprelu"),
        (lambda cfg: cfg.update(architecture="jumprelu"), "lacks threshold; it has W_dec, W_enc, b_dec, b_enc"),
        (lambda cfg: cfg.update(architecture="gated"), "lacks b_gate"),
        (lambda cfg: cfg.update(normalize_activations="x"), "normalize_activations 'x' is none that a variant here"),
    ],
    ids=range(10),
)
def test_settings_that_disagree_are_named(edit: Callable, message: str, tmp_path: Path) -> None:
    sample = samples.saelens_topk(tmp_path / "theirs")
    cfg = json.loads((sample.path / "cfg.json").read_text())
    edit(cfg)
    (sample.path / "cfg.json").write_text(json.dumps(cfg))
    with pytest.raises(UserError, match=message):
        sae_jax.import_dictionary(sample.path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_bias_of_another_length_is_refused(tmp_path: Path) -> None:
    """Before anything is computed with it."""
    paths = [samples.saelens_topk_rescaled(tmp_path / "a").path, samples.sof_batch_topk(tmp_path / "b").path]
    for path, file, name in zip(
        paths, ("sae_weights.safetensors", "model.safetensors"), ("b_enc", "encoder.bias"), strict=True
    ):
        arrays = load_file(path / file)
        save_file({**arrays, name: arrays[name][:8].copy()}, path / file)
    content = {**samples._linear(w := samples.numbers()), "bias": w["b_dec"], "encoder.bias": w["b_enc"][:8]}
    paths.append(samples._dictionary_learning(tmp_path / "c", "AutoEncoder", content, lambda x: (x, x)).path)
    for path in paths:
        with pytest.raises(UserError, match=r"b_enc is .8., W_enc .8, 24|are not (all )?of (its )?24 latents"):
            sae_jax.import_dictionary(path, tmp_path / "out")


def test_what_an_import_would_have_to_guess_is_refused(tmp_path: Path) -> None:
    w = samples.numbers()
    samples.write_torch(tmp_path / "tied" / "sae.pt", {"W": w["W_enc"], "b_enc": w["b_enc"], "b_dec": w["b_dec"]})
    content = {**samples._linear(w), "b_dec": w["b_dec"], **samples._selection()}
    samples.write_torch(tmp_path / "alone" / "ae.pt", content)
    samples._dictionary_learning(tmp_path / "unset", "BatchTopKSAE", content, lambda x: (x, x))
    samples.qwen_scope(tmp_path / "qwen").path.rename(tmp_path / "layer7.sae.pt")
    for path, message in (
        ("tied", "nothing says how many latents are active; give --k"),
        ("alone", "nothing says whether k are active in a row or in a batch"),
        ("unset/resid_post_layer_3/trainer_0", "selects the largest values of a batch, and has no threshold"),
        ("layer7.sae.pt", "nothing says how many latents are active; give --k"),
        ("unset", r"no dictionary itself; .* such as resid_post_layer_3/trainer_0"),
    ):
        with pytest.raises(UserError, match=message):
            sae_jax.import_dictionary(tmp_path / path, tmp_path / "out")
    assert sae_jax.import_dictionary(tmp_path / "layer7.sae.pt", tmp_path / "out", k=4).sae["k"] == 4
