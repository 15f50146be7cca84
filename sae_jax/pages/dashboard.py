"""A static site for looking at latents: a folder that opens from disk or from any static server, offline.

    index.html            the page; its view is what follows # in the address (routes: templates/site.js)
    style.css, *.js       copied from templates/
    data/index.js         summary and one column per quantity, for the table of all latents
    data/tokens.js        text of every token that appears somewhere
    data/labels.js        what latents stand for, where somebody has said so
    data/latents-NNN.js   histogram, contexts, logits and neighbours of 64 latents
    data/text-NNN.js      whole sequences, for contexts that a reader expands
    data/matches.js       where another dictionary stands beside it: which of its latents are like each
    beside/               the site of that one

Or, for a few latents, one page that holds all of these.

The data are scripts and not JSON because a page opened from disk may load scripts but may not fetch files. Columns are
little-endian numbers in base64: a million rows are read in a fraction of a second, where decimal text takes many.
"""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import unescape
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np

from sae_jax import storage
from sae_jax.pages import latents as shown
from sae_jax.pages.latents import Contexts, Latent, LogitEnds, Subject
from sae_jax.pages.matches import by_decoder, by_firing
from sae_jax.storage import AnyPath, StrPath
from sae_jax.types import UsageError

STYLES = ("style.css",)
SCRIPTS = ("site.js", "draw.js", "search.js", "shelf.js", "lists.js", "summary.js", "filters.js", "table.js")
SCRIPTS += ("contexts.js", "latent.js", "compare.js", "help.js", "app.js")

_TEMPLATES = files("sae_jax.pages") / "templates"
_GENERATOR = "sae_jax dashboard"
_LATENTS_PER_FILE = 64
_TEXT_TOKENS_PER_FILE = 2**16
_N_CHIPS = 3  # tokens of a latent in the table
_MAX_SHARES = 4  # sources whose share is a column of the table

Put = Callable[[str, str], None]  # takes the name of a script of the data, and its text


@dataclass(frozen=True)
class Site:
    """A dictionary as its pages show it."""

    subject: Subject
    # Text of each token id. Bytes that are not UTF-8 on their own come as the error handler "surrogateescape" decodes
    # them, and are shown as \\xNN.
    token_strings: Sequence[str]
    title: str  # name of the dictionary
    about: str  # what it is of, in a line that stands at the top of every page: model, place in it, size
    # (name, value, what it means) of what was measured, in order of importance
    metrics: Sequence[tuple[str, float | int | str | None, str]]
    config: Mapping[str, object]  # how it was made; may be nested. It is published: it should name no private paths
    latents: np.ndarray | None = None  # those that get a page, since a page takes about 6 kB; None: all
    digest: str | None = None  # of the dictionary: readers' lists and notes are kept under it; None: under the title

    @property
    def numbers(self) -> np.ndarray:
        """Those that get a page, i64[L]. UserError for one that does not exist."""
        return shown.chosen(self.subject.table.n_latents, self.latents)


def write_dashboard(
    out_dir: StrPath,
    site: Site,
    beside: Site | None = None,
    progress: Callable[[int], None] | None = None,
    lease: storage.Lease | None = None,
) -> None:
    """Write the site, in a temporary folder beside `out_dir` that takes its place when it is complete.

    Args:
        out_dir: where the site goes; an earlier dashboard there is replaced.
        site: what is shown.
        beside: another dictionary, whose site goes into the folder `beside`; each latent of one names those of the
            other that are like it.
        progress: called with the number of latents written.
        lease: `storage.lease_of_folder(out_dir)`, if the caller holds it already.

    Raises:
        UsageError: `out_dir` holds something that is not a dashboard.
        UserError: a latent that does not exist.
    """
    done = len(site.numbers)
    out = storage.path(out_dir).resolve()
    refuse_to_overwrite(out)
    with storage.new_folder(out, replace=True, lease=lease) as building:
        _write_site(building, site, {"href": "beside/index.html", "title": beside.title} if beside else None, progress)
        if beside is not None:
            (building / "beside").mkdir()
            back = {"href": "../index.html", "title": site.title}
            of_beside = None if progress is None else lambda n: progress(done + n)
            _write_site(building / "beside", beside, back, of_beside)
            _write_matches(building / "data", site.subject, beside.subject)
            _write_matches(building / "beside" / "data", beside.subject, site.subject)
        refuse_to_overwrite(out)  # a run may have begun there


def write_page(out: StrPath, site: Site, progress: Callable[[int], None] | None = None) -> None:
    """Write all of a site into one page, which needs no other file: to be sent, or put into a frame.

    Raises:
        UsageError: `out` is something that is not a dashboard.
        UserError: a latent that does not exist.
    """
    out = storage.path(out)
    refuse_to_overwrite(out, single_file=True)
    data: list[str] = []
    _write_data(lambda _, text: data.append(text), site, None, progress, is_whole=True)
    page = _render(
        site.title,
        site.about,
        inline_styles=[_template(name) for name in STYLES],
        inline_scripts=[*map(_template, SCRIPTS), *data],
    )
    storage.write_text(out, page)


def _write_site(
    folder: Path, site: Site, other: Mapping[str, str] | None, progress: Callable[[int], None] | None
) -> None:
    data = folder / "data"
    data.mkdir()
    _write_data(lambda name, text: _write_text(data / name, text), site, other, progress)
    _write_text(folder / "index.html", page_html(site.title, site.about))
    for name in (*STYLES, *SCRIPTS):
        _write_text(folder / name, _template(name))


def _write_data(
    put: Put,
    site: Site,
    other: Mapping[str, str] | None,
    progress: Callable[[int], None] | None,
    is_whole: bool = False,
) -> None:
    subject, numbers = site.subject, site.numbers
    used = _Used(np.zeros(len(site.token_strings), bool), np.zeros(len(subject.table.sequences), bool))
    columns = _write_latents(put, subject, numbers, used, progress)
    texts_per_file = _write_texts(put, subject, used)
    text_or_0 = [text if is_used else 0 for text, is_used in zip(site.token_strings, used.tokens, strict=True)]
    put("tokens.js", _call("tokens", text_or_0))
    labels = [[latent, subject.labels[latent][0]] for latent in numbers.tolist() if latent in subject.labels]
    if labels:
        put("labels.js", _call("labels", labels))
    said = {"title": site.title, "metrics": _plain(site.metrics), "config": _plain(site.config)}
    said |= {"digest": site.digest or site.title, "nLabels": len(labels), "isWhole": is_whole, "other": other}
    layout = {"scoreName": subject.score_name, "bytesPerToken": used.bytes_per_token, "textsPerFile": texts_per_file}
    put("index.js", _call("index", said | layout | _index(subject, numbers) | columns))


def _write_matches(data: Path, subject: Subject, other: Subject) -> None:
    """For each latent of a subject, shown or not, the latents of another that are like it."""
    found = {"cosine": by_decoder(subject, other), "firing": by_firing(subject.table, other.table)}
    columns = {
        name: matches
        and {"latents": _base64(matches.latents.astype("<i4")), "values": _base64(matches.values.astype("<f4"))}
        for name, matches in found.items()
    }
    _write_text(data / "matches.js", _call("matches", columns))


def _index(subject: Subject, latents: np.ndarray) -> dict[str, object]:
    table = subject.table
    counts, edges = table.density_histogram()
    return {
        "nLatents": table.n_latents,
        "nSilent": int((table.counts == 0).sum()),
        "nRows": table.n_rows,
        "latentsPerFile": _LATENTS_PER_FILE,
        "before": shown.BEFORE,
        "after": shown.AFTER,
        "reach": shown.REACH,
        "densityHistogram": {"counts": counts.tolist(), "edges": _short(edges)},
        "nShown": len(latents),
        "latents": None if len(latents) == table.n_latents else _base64(latents.astype("<u4")),
        "density": _base64(table.density[latents].astype("<f4")),
        "sources": [source.name for source in subject.sources],
        "shares": [_base64(share.astype("<f4")) for share in _shares(subject)[latents].T],
    }


def _shares(subject: Subject) -> np.ndarray:
    """f32[F, S] of the table; no columns where sources are one, or many."""
    return subject.shares if 1 < len(subject.sources) <= _MAX_SHARES else np.zeros((subject.table.n_latents, 0))


def refuse_to_overwrite(out: AnyPath, single_file: bool = False) -> None:
    """UsageError if there is something at `out` that is not a dashboard, or one of the other kind."""
    page = out if single_file else out / "index.html"
    if not out.exists() or (not single_file and out.is_dir() and not any(out.iterdir())):
        return
    if not is_dashboard(page):
        what, cure = ("page of a dashboard", "name") if single_file else ("dashboard", "folder")
        raise UsageError(f"{out} exists and is not a {what}; choose another {cure} or remove it")


def is_dashboard(page: AnyPath, about: str = "") -> bool:
    """Whether a file is the page of a dashboard, and of what is told in these words if some are given."""
    text = page.read_text(errors="replace") if page.is_file() else ""
    if f'content="{_GENERATOR}"' not in text:
        return False
    return not about or f">{about}</span>" in unescape(text).replace("\u00a0", " ")


@dataclass(frozen=True)
class _Used:
    """Which tokens and sequences the pages refer to: only these are written. Filled as pages are made."""

    tokens: np.ndarray  # bool[V]
    sequences: np.ndarray  # bool[n_seq]

    @property
    def bytes_per_token(self) -> int:
        return 2 if len(self.tokens) < 2**16 else 3  # all bits set: no token


def _write_latents(
    put: Put, subject: Subject, latents: np.ndarray, used: _Used, progress: Callable[[int], None] | None
) -> dict[str, str]:
    """Write the files of latents; return the columns of the table of all latents."""
    n = len(latents)
    score, largest = (np.zeros(n, "<f4") for _ in range(2))
    top_tokens, top_logits = (np.full((n, _N_CHIPS), -1, np.int64) for _ in range(2))
    records: list[dict[str, object]] = []
    for i, latent in enumerate(shown.describe(subject, latents)):
        score[i], largest[i] = latent.score, latent.max
        tokens = latent.tokens[:_N_CHIPS, 0]
        top_tokens[i, : len(tokens)] = tokens
        if latent.logits is not None:
            promoted = latent.logits.up[0][:_N_CHIPS]
            top_logits[i, : len(promoted)] = promoted
        records.append(_record(latent, used))
        if len(records) == _LATENTS_PER_FILE or i == n - 1:
            block = i // _LATENTS_PER_FILE
            put(f"latents-{block:03d}.js", _call("latents", block, records))
            records = []
            if progress is not None:
                progress(i + 1)
    columns = {"score": _base64(score), "max": _base64(largest)}
    ids = {"topTokens": top_tokens, "topLogits": top_logits}
    return columns | {name: _packed(of_all, used.bytes_per_token) for name, of_all in ids.items()}


def _record(latent: Latent, used: _Used) -> dict[str, object]:
    """A latent as its page reads it; marks what it refers to."""
    used.tokens[latent.tokens[:, 0]] = True
    record: dict[str, object] = {
        "count": latent.count,
        "mean": _short(latent.mean),
        "norm": _short(latent.norm),
        "tokens": latent.tokens.tolist(),
    }
    if latent.near is not None:
        record["near"] = _pairs(*latent.near)
    if latent.coactive is not None:
        others = latent.coactive
        triples = zip(others.latents.tolist(), others.counts.tolist(), _short(others.jaccard), strict=True)
        record["coactive"] = list(map(list, triples))
    if latent.label is not None:
        record["label"] = latent.label
    record |= _logits(latent.logits, used)
    if latent.sources:
        record["sources"] = [
            {"norm": _short(source.norm), "share": _short(source.share), **_logits(source.logits, used)}
            for source in latent.sources
        ]
    if latent.patterns is not None:
        for ids, _ in latent.patterns:
            used.tokens[[i for i in ids if i >= 0]] = True
        record["patterns"] = [[list(ids), times] for ids, times in latent.patterns]
    if latent.histogram is not None and latent.contexts is not None:
        record |= {"histogram": latent.histogram.tolist(), **_contexts(latent.contexts, used)}
    return record


def _logits(logits: LogitEnds | None, used: _Used) -> dict[str, list]:
    if logits is None:
        return {}
    for ids, _ in (logits.up, logits.down):
        used.tokens[ids] = True
    return {"up": _pairs(*logits.up), "down": _pairs(*logits.down)}


def _contexts(contexts: Contexts, used: _Used) -> dict[str, object]:
    """Token ids of the windows are one run of bytes, since their lengths follow from the positions. Values are sparse:
    a flat list of offset from the position of the context, value, offset, value, ..."""
    used.sequences[contexts.seq] = True
    ids = np.concatenate(contexts.windows)
    used.tokens[ids] = True
    values = []
    for offsets, of_offsets in contexts.values:
        pairs = np.empty((len(offsets), 2), object)
        pairs[:, 0], pairs[:, 1] = offsets.tolist(), _short(of_offsets)
        values.append(pairs.ravel().tolist())
    return {
        "seq": contexts.seq.tolist(),
        "pos": contexts.pos.tolist(),
        "length": contexts.length.tolist(),
        "ids": _packed(ids, used.bytes_per_token),
        "values": values,
        "nTop": contexts.n_top,
        "intervals": [[_short(i.low), _short(i.high), i.count, len(i.examples.seq)] for i in contexts.intervals],
    }


def _write_texts(put: Put, subject: Subject, used: _Used) -> int:
    """Write the sequences that contexts come from; return how many share a file."""
    sequences, lengths = subject.table.sequences, subject.shown_lengths
    per_file = max(1, _TEXT_TOKENS_PER_FILE // max(1, sequences.shape[1]))
    for low in range(0, len(sequences), per_file):
        is_used = used.sequences[low : low + per_file]
        if not is_used.any():
            continue
        part = [ids[:length] for ids, length in zip(sequences[low : low + per_file], lengths[low:], strict=False)]
        for ids, use in zip(part, is_used, strict=True):
            used.tokens[ids] |= use
        texts = [_packed(ids, used.bytes_per_token) if use else 0 for ids, use in zip(part, is_used, strict=True)]
        put(f"text-{low // per_file:03d}.js", _call("text", low // per_file, texts))
    return per_file


def _call(name: str, *arguments: object) -> str:
    """A script that hands data to the page; ASCII, and no `<`, so that no reader takes a token for a tag."""
    texts = (json.dumps(x, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c") for x in arguments)
    return f"saeDashboard.{name}({','.join(texts)});\n"


def page_html(title: str, about: str, scripts: Sequence[str] = (), styles: Sequence[str] = ()) -> str:
    """The page that reads the data; `scripts` and `styles` are loaded after its own."""
    of_data = ("data/tokens.js", "data/index.js")
    return _render(title, about, scripts=[*SCRIPTS, *scripts, *of_data], styles=[*STYLES, *styles])


def _render(title: str, about: str, **parts: Sequence[str]) -> str:
    import jinja2

    environment = jinja2.Environment(autoescape=True, trim_blocks=True)
    page = environment.from_string(_template("index.html"))
    return page.render(title=title, about=about, generator=_GENERATOR, **parts)


def _template(name: str) -> str:
    return (_TEMPLATES / name).read_text("utf-8")


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


def _packed(ids: np.ndarray, n_bytes: int) -> str:
    """Token ids as little-endian integers of n_bytes, in base64; -1 has all bits set."""
    return _base64(np.ascontiguousarray(ids, "<i4").view(np.uint8).reshape(-1, 4)[:, :n_bytes])


def _base64(array: np.ndarray) -> str:
    return base64.b64encode(array.tobytes()).decode("ascii")


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
