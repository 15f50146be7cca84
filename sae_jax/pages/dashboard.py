"""A static site for looking at latents: a folder that opens from disk or from any static server, offline.

    index.html            the page; its view is what follows # in the address (routes: templates/site.js)
    style.css, *.js       copied from templates/
    data/index.js         summary and one column per sortable quantity, for the table of all latents
    data/tokens.js        text of every token that appears somewhere
    data/latents-NNN.js   histogram, contexts, logits and neighbours of 256 latents
    data/text-NNN.js      whole sequences, for contexts that a reader expands

The data are scripts and not JSON because a page opened from disk may load scripts but may not fetch files.

`effect` of a latent: root mean square over the vocabulary of its centred logit effect, at its mean active
value. Without a language model the table shows `energy` instead: mean over all tokens of value^2 times the
squared norm of its decoder row.
"""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np

from sae_jax import storage
from sae_jax.analysis.examples import Activations
from sae_jax.progress import say_once
from sae_jax.types import UsageError, UserError

STYLES = ("style.css",)
SCRIPTS = ("site.js", "draw.js", "table.js", "latent.js", "app.js")

_TEMPLATES = files("sae_jax.pages") / "templates"
_GENERATOR = "sae_jax dashboard"
_LATENTS_PER_FILE = 256
_TEXT_TOKENS_PER_FILE = 2**16
_PRODUCT_ENTRIES = 2**24  # entries of a block of cosines or logits: 64 MiB

_BEFORE, _AFTER = 20, 10  # tokens of a context around its strongest
_REACH = 128  # tokens to either side whose values an expanded context shows
_N_TOP, _N_INTERVALS, _PER_INTERVAL = 20, 5, 4
_N_LOGITS, _N_NEAR, _N_STRONGEST = 10, 8, 25
_MOST_PAIRS = 2**32  # of activations on one row, that are counted: a minute or so


def write_dashboard(
    out_dir: str | Path,
    *,
    table: Activations,
    token_strings: Sequence[str],
    w_dec: np.ndarray,
    logit_effects: Callable[[np.ndarray], np.ndarray] | None,
    title: str,
    about: str,
    metrics: Sequence[tuple[str, float | int | str | None, str]],
    config: Mapping[str, object],
    lengths: np.ndarray | None = None,
    latents: np.ndarray | None = None,
    labels: Mapping[int, tuple[str, str]] | None = None,
    progress: Callable[[int, int], None] | None = None,
    lease: storage.Lease | None = None,
) -> None:
    """Write the site, in a temporary folder beside `out_dir` that takes its place when it is complete.

    Args:
        out_dir: where the site goes; an earlier dashboard there is replaced.
        table: the activations to show.
        token_strings: text of each token id. Bytes that are not UTF-8 on their own come as the error handler
            "surrogateescape" decodes them, and are shown as \\xNN.
        w_dec: f32[F, D] decoder rows.
        logit_effects: from rows f32[n, D] to their effect on the logits f32[n, V] at activation 1, through
            the final norm and the unembedding as the caller sees fit; None where there is no language model.
            Columns beyond `token_strings` (padding of the vocabulary) are ignored.
        title: name of the dictionary.
        about: what it is of, in a line that stands at the top of every page: model, place in it, size.
        metrics: (name, value, what it means) of what was measured, in order of importance.
        config: how the dictionary was made; may be nested. It is published: it should name no private paths.
        lengths: i64[n_seq], tokens of each sequence that are shown, those after which are padding; None for all.
        latents: numbers of the latents that get a page, since a page takes about 6 kB; None for all.
        labels: (what it stands for, who says so) of latents that have been explained.
        progress: called with (latents written, latents).
        lease: `storage.lease_of_folder(out_dir)`, if the caller holds it already.

    Raises:
        UsageError: `out_dir` holds something that is not a dashboard.
        UserError: the table, the tokens and the decoder do not fit each other.
    """
    latents = np.arange(table.n_latents) if latents is None else np.unique(latents)
    out_dir = Path(out_dir).absolute()
    refuse_to_overwrite(out_dir)
    _check(table, len(token_strings), w_dec, latents)
    sequences = table.sequences

    with storage.new_folder(out_dir, replace=True, lease=lease) as building:
        data = building / "data"
        data.mkdir()
        lengths = np.full(len(sequences), sequences.shape[1]) if lengths is None else lengths
        shown = _Shown(np.zeros(len(token_strings), bool), np.zeros(len(sequences), bool), lengths)
        columns = _write_latents(data, table, latents, w_dec, logit_effects, labels or {}, shown, progress)
        texts_per_file = _write_texts(data, sequences, shown)
        text_or_0 = [text if used else 0 for text, used in zip(token_strings, shown.tokens, strict=True)]
        _write_script(data / "tokens.js", "tokens", text_or_0)
        score = "energy" if logit_effects is None else "effect"
        head = {"title": title, "metrics": _plain(metrics), "config": _plain(config), "scoreName": score}
        sizes = {"bytesPerToken": shown.bytes_per_token, "textsPerFile": texts_per_file}
        _write_script(data / "index.js", "index", head | sizes | _index(table, latents) | columns)
        _write_page(building, title, about)
        refuse_to_overwrite(out_dir)  # a run may have begun there


def _index(table: Activations, latents: np.ndarray) -> dict[str, object]:
    counts, edges = table.density_histogram()
    return {
        "nLatents": table.n_latents,
        "nSilent": int((table.counts == 0).sum()),
        "nRows": table.n_rows,
        "latentsPerFile": _LATENTS_PER_FILE,
        "before": _BEFORE,
        "after": _AFTER,
        "reach": _REACH,
        "densityHistogram": {"counts": counts.tolist(), "edges": _short(edges)},
        "latents": latents.tolist(),
        "density": _short(table.density[latents]),
    }


def decoder_neighbours(w_dec: np.ndarray, latents: np.ndarray, n: int) -> tuple[np.ndarray, np.ndarray]:
    """The decoder rows nearest by cosine to those of L latents, without themselves, nearest first.

    Cosines are made 64 MiB at a time, but at least for 32 latents; 2 L F D FLOP in all.

    Args:
        w_dec: f32[F, D].
        latents: i64[L].
        n: how many; at most F - 1 are given.

    Returns:
        Numbers of the neighbours i64[L, n], and their cosines f32[L, n].
    """
    n = min(n, len(w_dec) - 1)
    near_LN = np.empty((len(latents), n), np.int64)
    cosine_LN = np.empty((len(latents), n), np.float32)
    norm_F = np.maximum(np.linalg.norm(w_dec, axis=1), np.finfo(np.float32).tiny)
    step = max(32, _PRODUCT_ENTRIES // len(w_dec))
    for low in range(0, len(latents) if n else 0, step):
        part = slice(low, low + step)
        cosine_BF = w_dec[latents[part]] @ w_dec.T
        cosine_BF /= norm_F
        cosine_BF /= norm_F[latents[part], None]
        np.put_along_axis(cosine_BF, latents[part, None], -np.inf, axis=1)
        near_LN[part], cosine_LN[part] = _largest_of_rows(cosine_BF, n)
    return near_LN, cosine_LN


def refuse_to_overwrite(out_dir: Path) -> None:
    """UsageError if there is something at `out_dir` that is not a dashboard."""
    if not out_dir.exists() or (out_dir.is_dir() and not any(out_dir.iterdir())):
        return
    page = out_dir / "index.html"
    if not (page.is_file() and f'content="{_GENERATOR}"' in page.read_text(errors="replace")):
        raise UsageError(f"{out_dir} exists and is not a dashboard; choose another folder or remove it")


def _check(table: Activations, n_tokens: int, w_dec: np.ndarray, latents: np.ndarray) -> None:
    if len(w_dec) != table.n_latents:
        raise UserError(f"w_dec has {len(w_dec)} rows for {table.n_latents} latents; give one row for each latent")
    strange = latents[(latents < 0) | (latents >= table.n_latents)]
    if strange.size:
        raise UserError(f"latent {strange[0]} does not exist; choose from 0 to {table.n_latents - 1}")
    if not latents.size:
        raise UserError("no latents to show; name at least one")
    strange = table.sequences[(table.sequences < 0) | (table.sequences >= n_tokens)]
    if strange.size:
        raise UserError(f"token id {strange[0]} has no text; give more than {n_tokens} token_strings")


@dataclass(frozen=True)
class _Shown:
    """Which tokens and sequences the pages refer to: only these are written. Filled as pages are made."""

    tokens: np.ndarray  # bool[V]
    sequences: np.ndarray  # bool[n_seq]
    lengths: np.ndarray  # i64[n_seq], of which the rest is padding

    @property
    def bytes_per_token(self) -> int:
        return 2 if len(self.tokens) <= 2**16 else 3


def _write_latents(
    data: Path,
    table: Activations,
    latents: np.ndarray,
    w_dec: np.ndarray,
    logit_effects: Callable[[np.ndarray], np.ndarray] | None,
    labels: Mapping[int, tuple[str, str]],
    shown: _Shown,
    progress: Callable[[int, int], None] | None,
) -> dict[str, list]:
    """Write the files of latents; return the columns of the table of all latents."""
    near_LN, cosine_LN = decoder_neighbours(w_dec, latents, _N_NEAR)
    coactive = []
    if table.n_pairs <= _MOST_PAIRS:
        coactive = table.coactive(latents, _N_NEAR)
    else:
        say_once(f"{table.n_pairs:,} pairs of latents on one row are too many: pages are without co-activations")
    columns: dict[str, list] = {"score": [], "max": [], "topTokens": [], "topLogits": []}
    for low in range(0, len(latents), _LATENTS_PER_FILE):
        part = latents[low : low + _LATENTS_PER_FILE]
        logits = _logit_ends(w_dec[part], logit_effects, shown) if logit_effects is not None else None
        records = []
        for i, latent in enumerate(part.tolist()):
            _, values = table.of_latent(latent)
            norm = float(np.linalg.norm(w_dec[latent]))
            mean = values.mean(dtype=np.float64) if len(values) else 0.0
            tokens = _commonest(table, latent)
            shown.tokens[[token for token, _ in tokens]] = True
            record: dict[str, object] = {
                "count": len(values),
                "mean": _short(mean),
                "norm": _short(norm),
                "tokens": tokens,
                "near": _pairs(near_LN[low + i], cosine_LN[low + i]),
            }
            if coactive:
                others = coactive[low + i]
                triples = zip(others.latents.tolist(), others.counts.tolist(), _short(others.jaccard), strict=True)
                record["coactive"] = list(map(list, triples))
            if latent in labels:
                record["label"] = labels[latent]
            if len(values):
                record |= _contexts(table, latent, shown)
            promoted = []
            if logits is None:
                score = np.square(values, dtype=np.float64).sum() / max(table.n_rows, 1) * norm**2
            else:
                score = logits[i].spread * mean
                promoted = logits[i].up
                record |= {"up": promoted, "down": logits[i].down}
            records.append(record)
            columns["score"].append(_short(score))
            columns["max"].append(_short(values.max(initial=0.0)))
            columns["topTokens"].append([token for token, _ in tokens[:3]])
            columns["topLogits"].append([token for token, _ in promoted[:3]])
        block = low // _LATENTS_PER_FILE
        _write_script(data / f"latents-{block:03d}.js", "latents", block, records)
        if progress is not None:
            progress(low + len(part), len(latents))
    return columns


def _contexts(table: Activations, latent: int, shown: _Shown) -> dict[str, object]:
    """Histogram and contexts of a latent that fires: the strongest contexts first, then those of each interval.

    Token ids of the windows are one run of bytes, since their lengths follow from the positions. Values are
    sparse: a flat list of offset from the position of the context, value, offset, value, ..., as far as an
    expanded context reaches.
    """
    intervals = table.quantile_samples(latent, _N_INTERVALS, _PER_INTERVAL)[::-1]
    groups = [
        table.top(latent, _N_TOP, one_per_sequence=True),
        *(interval.examples for interval in intervals),
    ]
    seq_E = np.concatenate([group.seq for group in groups])
    pos_E = np.concatenate([group.pos for group in groups])
    shown.sequences[seq_E] = True

    at_ET = pos_E[:, None] + np.arange(-_BEFORE, _AFTER + 1)
    row_ET = np.broadcast_to(seq_E[:, None], at_ET.shape)
    inside_ET = (at_ET >= 0) & (at_ET < shown.lengths[seq_E, None])
    window = table.sequences[row_ET[inside_ET], at_ET[inside_ET]]
    shown.tokens[window] = True

    value_ET = table.windows(latent, seq_E, pos_E - _REACH, 2 * _REACH + 1)
    context, offset = np.nonzero(value_ET)
    pairs = np.empty((len(context), 2), object)
    pairs[:, 0] = (offset - _REACH).tolist()
    pairs[:, 1] = _short(value_ET[context, offset])
    values = np.split(pairs, np.searchsorted(context, np.arange(1, len(seq_E))))

    counts, _ = table.histogram(latent)
    return {
        "histogram": counts.tolist(),
        "seq": seq_E.tolist(),
        "pos": pos_E.tolist(),
        "length": shown.lengths[seq_E].tolist(),
        "ids": _packed(window, shown.bytes_per_token),
        "values": [of_context.ravel().tolist() for of_context in values],
        "nTop": len(groups[0].seq),
        "intervals": [[_short(i.low), _short(i.high), i.count, len(i.examples.seq)] for i in intervals],
    }


@dataclass(frozen=True)
class _LogitEnds:
    """The tokens a latent promotes and suppresses most at activation 1, and its spread over all tokens."""

    up: list  # [token id, effect] pairs, largest first
    down: list  # the same, smallest first
    spread: float  # root mean square of the centred effect


def _logit_ends(
    w_dec: np.ndarray, logit_effects: Callable[[np.ndarray], np.ndarray], shown: _Shown
) -> list[_LogitEnds]:
    n_tokens = len(shown.tokens)
    step = max(1, _PRODUCT_ENTRIES // n_tokens)
    ends = []
    for low in range(0, len(w_dec), step):
        effect_LV = np.asarray(logit_effects(w_dec[low : low + step]), np.float32)[:, :n_tokens]
        effect_LV = effect_LV - effect_LV.mean(axis=1, keepdims=True)
        n_ends = min(_N_LOGITS, effect_LV.shape[1])
        up, down = _largest_of_rows(effect_LV, n_ends), _largest_of_rows(-effect_LV, n_ends)
        shown.tokens[up[0]] = shown.tokens[down[0]] = True
        for i, spread in enumerate(effect_LV.std(axis=1)):
            ends.append(_LogitEnds(_pairs(up[0][i], up[1][i]), _pairs(down[0][i], -down[1][i]), float(spread)))
    return ends


def _largest_of_rows(value_BN: np.ndarray, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Indices and values of the n largest entries of each row, descending."""
    index_Bn = np.argpartition(-value_BN, n - 1, axis=1)[:, :n]
    value_Bn = np.take_along_axis(value_BN, index_Bn, axis=1)
    order_Bn = np.argsort(-value_Bn, axis=1, kind="stable")
    return np.take_along_axis(index_Bn, order_Bn, axis=1), np.take_along_axis(value_Bn, order_Bn, axis=1)


def _commonest(table: Activations, latent: int) -> list[list[int]]:
    """[token id, count] of the tokens under a latent's strongest activations, commonest first."""
    top = table.top(latent, _N_STRONGEST)
    token = table.sequences[top.seq, top.pos]
    ids, first, counts = np.unique(token, return_index=True, return_counts=True)
    order = np.lexsort((first, -counts))
    return np.stack([ids[order], counts[order]], axis=1).tolist()


def _write_texts(data: Path, sequences: np.ndarray, shown: _Shown) -> int:
    """Write the sequences that contexts come from; return how many share a file."""
    per_file = max(1, _TEXT_TOKENS_PER_FILE // max(1, sequences.shape[1]))
    for low in range(0, len(sequences), per_file):
        used = shown.sequences[low : low + per_file]
        if not used.any():
            continue
        part = [ids[:length] for ids, length in zip(sequences[low : low + per_file], shown.lengths[low:], strict=False)]
        for ids, use in zip(part, used, strict=True):
            shown.tokens[ids] |= use
        texts = [_packed(ids, shown.bytes_per_token) if use else 0 for ids, use in zip(part, used, strict=True)]
        _write_script(data / f"text-{low // per_file:03d}.js", "text", low // per_file, texts)
    return per_file


def _write_script(path: Path, call: str, *arguments: object) -> None:
    """A script that hands data to the page; ASCII, and no `<`, so that no reader takes a token for a tag."""
    texts = (json.dumps(x, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c") for x in arguments)
    path.write_text(f"saeDashboard.{call}({','.join(texts)});\n", encoding="ascii")


def page_html(title: str, about: str, scripts: Sequence[str] = (), styles: Sequence[str] = ()) -> str:
    """The page that reads the data; `scripts` and `styles` are loaded after its own."""
    import jinja2

    environment = jinja2.Environment(autoescape=True, trim_blocks=True)
    page = environment.from_string((_TEMPLATES / "index.html").read_text("utf-8"))
    names = {"scripts": [*SCRIPTS, *scripts], "styles": [*STYLES, *styles]}
    return page.render(title=title, about=about, generator=_GENERATOR, **names)


def _write_page(folder: Path, title: str, about: str) -> None:
    (folder / "index.html").write_text(page_html(title, about), encoding="utf-8")
    for name in (*STYLES, *SCRIPTS):
        (folder / name).write_text((_TEMPLATES / name).read_text("utf-8"), encoding="utf-8")


def _packed(ids: np.ndarray, n_bytes: int) -> str:
    """Token ids as little-endian integers of n_bytes, in base64: about half the size of decimal text."""
    as_bytes = np.ascontiguousarray(ids, "<u4").view(np.uint8).reshape(-1, 4)[:, :n_bytes]
    return base64.b64encode(as_bytes.tobytes()).decode("ascii")


def _pairs(ids: np.ndarray, values: np.ndarray) -> list[list]:
    return [list(pair) for pair in zip(ids.tolist(), _short(values), strict=True)]


def _short(values: np.ndarray | float) -> Any:
    """Numbers rounded to 4 significant digits, which is all a page shows, as Python numbers."""
    values = np.asarray(values, np.float64)
    size = np.floor(np.log10(np.abs(values), where=values != 0, out=np.zeros_like(values)))
    scale = 10.0 ** (3 - size)
    return (np.round(values * scale) / scale).tolist()


def _plain(value: object) -> object:
    """A value as JSON can hold it: NaN and infinities become null, unknown objects their text."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)
