"""A sheet for people who rate latents without knowing which they are.

    sheet.csv        a line an item: its code, texts in which a latent is strongest, with the tokens at which it fires
                     as <<token>>, and a cell for the rating, from 1 (no pattern) to 5 (one clear pattern)
    sheet.key.json   which latent of which store each item is

The items stand in random order and their codes tell nothing. Each rater fills in a copy. The agreement of raters is
Krippendorff's alpha with squared differences (Krippendorff 2011, "Computing Krippendorff's Alpha-Reliability"): 1 is
agreement on every item, 0 what chance gives.
"""

from __future__ import annotations

import contextlib
import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from sae_jax import storage
from sae_jax.analysis.bootstrap import mean_and_interval
from sae_jax.analysis.store import Store
from sae_jax.autointerp.explain import choose
from sae_jax.autointerp.fragments import N_SHOWN, Fragment, Texts, readable
from sae_jax.types import UsageError, UserError

LOWEST, HIGHEST = 1, 5
COLUMNS = ("item", *(f"text {i}" for i in range(1, N_SHOWN + 1)), "rating")
MAX_BYTES = 2**26  # of a sheet
_SYLLABLES = [a + b for a in "bdfgklmnprstvz" for b in "aeiou"]


class Item(msgspec.Struct, frozen=True):
    """A latent on a sheet."""

    store: str
    latent: int
    kind: str  # dictionary or baseline


class Key(msgspec.Struct, frozen=True):
    """What the items of a sheet are."""

    items: dict[str, Item]  # by code


@dataclass(frozen=True)
class Ratings:
    """What raters said."""

    n_items: int
    n_raters: int
    n_missing: int  # cells without a rating
    alpha: float | None  # None of one rater, or if no item has two ratings, or all ratings are equal
    means: dict[str, tuple[float, tuple[float, float] | None, int]]  # by kind: mean, its interval, and items rated


def write_sheet(
    path: str | Path,
    store: str | Path,
    latents: Sequence[int] = (),
    n: int | None = None,
    baseline: str | Path | None = None,
    seed: int = 0,
    tokenizer: str | None = None,
) -> Path:
    """Write a sheet of latents of a store, mixed with as many of a baseline's store; returns the path of its key.

    Arguments as of `explain.explain`. UsageError if there is something at `path`; else errors as there.
    """
    path = Path(path)
    key_path = path.with_name(f"{path.stem}.key.json")
    for file in (path, key_path):
        if file.exists():
            raise UsageError(f"{file} exists; choose another name for the sheet, or delete it")
    rng = np.random.default_rng(seed)
    rows: list[tuple[Item, list[Fragment]]] = []
    for kind, where in (("dictionary", store), ("baseline", baseline)):
        if where is None:
            continue
        texts = Texts.of(Store(where), tokenizer)
        n_drawn = len(set(latents)) if kind == "baseline" and latents else n
        chosen = choose(texts, str(where), latents if kind == "dictionary" else (), n_drawn, N_SHOWN, seed)
        if silent := [latent for latent in chosen if texts.n_texts(latent) < N_SHOWN]:
            raise UsageError(f"latent {silent[0]} fires in fewer than {N_SHOWN} texts; leave it out")
        rows += [(Item(str(where), latent, kind), texts.strongest(latent)) for latent in chosen]
    codes = _codes(len(rows), rng)
    file = io.StringIO(newline="")
    sheet = csv.writer(file)
    sheet.writerow(COLUMNS)
    items = {}
    for code, i in zip(codes, rng.permutation(len(rows)).tolist(), strict=True):
        items[code], fragments = rows[i]
        sheet.writerow([code, *map(_marked, fragments), ""])
    content = storage.sealed({"items": {code: msgspec.to_builtins(item) for code, item in items.items()}})
    storage.write_json(key_path, content)
    storage.write_bytes(path, file.getvalue().encode("utf-8-sig"))  # by which Excel knows that it is UTF-8
    return key_path


def read_ratings(paths: Sequence[str | Path], key: str | Path | None = None) -> Ratings:
    """Read the sheets that raters have filled in.

    Args:
        paths: a file of each rater, all of one sheet.
        key: of the sheet; None: the one that has its items, in the folder of the first file.

    Raises:
        UserError: a file that is no such sheet, naming the row.
        UsageError: no key.
    """
    if not paths:
        raise UsageError("name the sheets that were filled in, one of each rater")
    if len({Path(path).resolve() for path in paths}) < len(paths):
        raise UsageError("a sheet is named twice; name one of each rater")
    tables = [_read(path) for path in paths]
    items = _key_of(tables[0], Path(paths[0]), key)
    ratings_RI = np.stack([_ratings(table, items, path) for table, path in zip(tables, paths, strict=True)])
    is_rated_I = ~np.isnan(ratings_RI).all(axis=0)
    kinds = np.array([item.kind for item in items.values()])
    means = {}
    for kind in ("dictionary", "baseline"):
        of_kind_RI = ratings_RI[:, is_rated_I & (kinds == kind)]
        if of_kind_RI.size:
            means[kind] = (*mean_and_interval(np.nanmean(of_kind_RI, axis=0)), of_kind_RI.shape[1])
    if not means:
        raise UserError(f"{paths[0]}: no item has a rating; fill in the column rating")
    n_missing = int(np.isnan(ratings_RI).sum())
    return Ratings(len(items), len(paths), n_missing, krippendorff_alpha(ratings_RI), means)


def krippendorff_alpha(ratings_RI: np.ndarray) -> float | None:
    """1 - observed / expected squared difference of two ratings, f64[raters, items] with NaN for none.

    Observed is within items, each weighted by its number of ratings, expected is over all of those that have two.
    None if no item has two ratings, or all ratings are equal.
    """
    ratings_RI = ratings_RI[:, (~np.isnan(ratings_RI)).sum(axis=0) >= 2]
    n_I = (~np.isnan(ratings_RI)).sum(axis=0)
    if not len(n_I):
        return None
    # The mean squared difference of two values is twice their variance with n - 1.
    observed = float((n_I * 2 * np.nanvar(ratings_RI, axis=0, ddof=1)).sum() / n_I.sum())
    expected = 2 * float(np.nanvar(ratings_RI, ddof=1))
    return None if expected == 0 else 1 - observed / expected


def _codes(n: int, rng: np.random.Generator) -> list[str]:
    """Different words that can be said aloud."""
    codes: dict[str, None] = {}
    while len(codes) < n:
        codes["".join(rng.choice(_SYLLABLES, 4))] = None
    return list(codes)


def _marked(fragment: Fragment) -> str:
    """A text with its active tokens marked. It begins with a dot, so that no spreadsheet takes it for a formula."""
    tokens = zip(fragment.tokens, fragment.values, strict=True)
    return "… " + readable([f"<<{token}>>" if value > 0 else token for token, value in tokens])


def _read(path: str | Path) -> list[tuple[int, dict[str, str]]]:
    """(number of its line, {column: cell}) of each row of a sheet."""
    try:
        text = storage.read_limited(path, MAX_BYTES).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is no UTF-8 text (byte {error.start}); save it as CSV in UTF-8") from None
    delimiter = next((mark for mark in ";\t" if text.partition("\n")[0].count(mark) > 2), ",")  # as some programs save
    reader = csv.reader(io.StringIO(text, newline=""), strict=True, delimiter=delimiter)
    rows: list[tuple[int, dict[str, str]]] = []
    header: list[str] = []
    number = 1
    try:
        for number, cells in enumerate(reader, 1):
            cells = [cell.strip() for cell in cells]
            if number == 1:
                header = cells
                if missing := [name for name in ("item", "rating") if header.count(name) != 1]:
                    raise UserError(f"{path}: row 1 names no column {missing[0]}; keep the first row of the sheet")
            elif len(cells) != len(header) and any(cells):
                raise UserError(f"{path}: row {number} has {len(cells)} cells, and row 1 {len(header)}; restore it")
            elif any(cells):
                rows.append((number, dict(zip(header, cells, strict=True))))
    except csv.Error as error:
        raise UserError(f"{path}: row {number + 1} is no CSV ({error}); save it with its quotes") from None
    if not rows:
        raise UserError(f"{path} has no rows; give a sheet that was filled in")
    return rows


def _ratings(rows: list[tuple[int, dict[str, str]]], items: Mapping[str, Item], path: str | Path) -> np.ndarray:
    """f64[items], NaN where there is none."""
    column = {code: i for i, code in enumerate(items)}
    ratings_I, seen = np.full(len(items), np.nan), set()
    for number, row in rows:
        code, cell = row["item"], row["rating"]
        if code not in column:
            raise UserError(f"{path}: row {number}: no item of this sheet is called {code!r}; restore its code")
        if code in seen:
            raise UserError(f"{path}: row {number}: item {code} is there twice; keep one")
        seen.add(code)
        if cell:
            if cell not in map(str, range(LOWEST, HIGHEST + 1)):
                raise UserError(
                    f"{path}: row {number}: rating {cell!r} must be a whole number from {LOWEST} to {HIGHEST}, or empty"
                )
            ratings_I[column[code]] = int(cell)
    if absent := [code for code in items if code not in seen]:
        raise UserError(f"{path}: item {absent[0]} has no row; restore it, with an empty rating if it has none")
    return ratings_I


def _key_of(rows: list[tuple[int, dict[str, str]]], sheet: Path, key: str | Path | None) -> dict[str, Item]:
    """The items of a sheet, by the key that is named or that has most of its codes."""
    codes = {row["item"] for _, row in rows}
    if key is not None:
        return _read_key(Path(key))
    read = []
    for path in sorted(sheet.resolve().parent.glob("*.key.json")):
        with contextlib.suppress(UserError):  # of something else
            read.append(_read_key(path))
    best = max(read, key=lambda items: len(codes & items.keys()), default={})
    if not codes & best.keys():
        raise UsageError(f"{sheet}: its key (.key.json) is not in its folder; name it with --key")
    return best


def _read_key(path: Path) -> dict[str, Item]:
    content: dict[str, Any] | None = storage.read_json(path)
    if content is None:
        raise UsageError(f"{path} is not there; name the key that was written beside the sheet")
    return storage.as_type(storage.unsealed(content, str(path)), Key, path).items
