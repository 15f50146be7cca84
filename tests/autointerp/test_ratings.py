"""A sheet says nothing of which latents it shows; what comes back is read, or refused by row."""

import csv
import io
import itertools
import json
import shutil

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sae_jax.autointerp import ratings
from sae_jax.autointerp.ratings import krippendorff_alpha, read_ratings, write_sheet
from sae_jax.commands import main as cli
from sae_jax.types import UsageError, UserError
from tests.autointerp.conftest import make_store, words


def rows_of(path):
    return list(csv.reader(io.StringIO(path.read_text("utf-8-sig"), newline="")))


def fill(sheet, path, rating, delimiter=","):
    """A copy in which each item has the rating that `rating(item)` gives."""
    header, *rows = rows_of(sheet)
    with open(path, "w", newline="", encoding="utf-8") as file:
        csv.writer(file, delimiter=delimiter).writerows([header, *([*row[:-1], rating(row[0])] for row in rows)])
    return path


@pytest.fixture
def sheet(store, tmp_path):
    make_store(tmp_path / "random")
    path = tmp_path / "sheet.csv"
    write_sheet(path, store, latents=(5, 1, 6), baseline=tmp_path / "random", seed=3)
    return path


def kinds(sheet):
    key = json.loads(sheet.with_name("sheet.key.json").read_text())
    return {code: (item["kind"], item["latent"]) for code, item in key["items"].items()}


def test_a_sheet_shows_texts_and_not_whose_they_are(sheet, store):
    header, *rows = rows_of(sheet)
    assert header == list(ratings.COLUMNS)
    assert {row[0] for row in rows} == kinds(sheet).keys()
    of_kind = sorted(kinds(sheet).values())
    assert [kind for kind, _ in of_kind] == ["baseline"] * 3 + ["dictionary"] * 3
    assert [latent for _, latent in of_kind[3:]] == [1, 5, 6]
    strings = {latent: ratings.Texts.of(ratings.Store(store), None)._strings[words()[latent]] for latent in range(8)}
    for code, *texts, rating in rows:
        assert rating == ""
        assert len(texts) == 5
        for text in texts:
            assert f"<<{strings[kinds(sheet)[code][1]]}>>" in text
            assert text.startswith("… "), "no spreadsheet takes it for a formula"
    in_order = [kinds(sheet)[row[0]] for row in rows]
    assert in_order not in (of_kind, of_kind[::-1])
    text = sheet.read_text()
    assert "dictionary" not in text
    assert "baseline" not in text
    assert str(store) not in text
    with pytest.raises(UsageError, match=r"sheet.csv exists; choose another name"):
        write_sheet(sheet, store, n=2)


def test_ratings_come_back(sheet, tmp_path, capsys):
    is_ours = {code: kind == "dictionary" for code, (kind, _) in kinds(sheet).items()}
    skipped = min(code for code, ours in is_ours.items() if not ours)
    one = fill(sheet, tmp_path / "one.csv", lambda code: "" if code == skipped else 5 if is_ours[code] else 1)
    two = fill(sheet, tmp_path / "two.csv", lambda code: 4 if is_ours[code] else 2, delimiter=";")
    found = read_ratings([one, two])
    assert (found.n_items, found.n_raters, found.n_missing) == (6, 2, 1)
    assert found.means["dictionary"] == (4.5, (4.5, 4.5), 3)
    assert found.means["baseline"][0] == pytest.approx((1.5 + 1.5 + 2) / 3)
    # By hand: four squared differences of 1 within pairs and one pair more; all pairs of the ten values.
    values = [5, 4] * 3 + [1, 2] * 2
    expected = np.mean([(a - b) ** 2 for a, b in itertools.permutations(values, 2)])
    assert found.alpha == pytest.approx(1 - 1 / expected)
    assert cli.main(["explain", "store", "--ratings", str(one), str(two)]) == 0
    out = capsys.readouterr().out
    assert "6 items, 2 raters, 1 ratings missing; agreement (Krippendorff's alpha) 0.813" in out
    assert "dictionary  3      4.50 [4.50, 4.50]" in out
    assert read_ratings([two], sheet.with_name("sheet.key.json")).alpha is None


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda rows: rows[1].__setitem__(-1, "6"), "row 2: rating '6' must be a whole number from 1 to 5, or empty"),
        (lambda rows: rows[3].__setitem__(-1, "good"), "row 4: rating 'good' must be"),
        (lambda rows: rows[2].__setitem__(0, "hello"), "row 3: no item of this sheet is called 'hello'"),
        (lambda rows: rows.append(rows[1]), "row 8: item .* is there twice; keep one"),
        (lambda rows: rows.pop(4), "item .* has no row; restore it"),
        (lambda rows: rows[5].append("a remark"), "row 6 has 8 cells, and row 1 7"),
        (lambda rows: rows[0].__setitem__(-1, "mark"), "row 1 names no column rating; keep the first row"),
        (lambda rows: rows.clear(), "has no rows"),
        (lambda rows: [row.__setitem__(-1, "") for row in rows[1:]], "no item has a rating; fill in the column rating"),
    ],
)
def test_a_sheet_that_does_not_fit_is_refused_by_row(sheet, tmp_path, change, said):
    filled = rows_of(fill(sheet, tmp_path / "filled.csv", lambda code: 3))
    change(filled)
    with open(tmp_path / "filled.csv", "w", newline="") as file:
        csv.writer(file).writerows(filled)
    with pytest.raises(UserError, match=f"filled.csv:? .*{said}|filled.csv:? {said}"):
        read_ratings([tmp_path / "filled.csv"])


def test_a_sheet_without_its_key_or_that_is_none_is_refused(sheet, tmp_path):
    (tmp_path / "away").mkdir()
    shutil.copy(sheet, tmp_path / "away" / "filled.csv")
    (tmp_path / "away" / "other.key.json").write_text("{}")
    with pytest.raises(UsageError, match=r"its key \(\.key\.json\) is not in its folder; name it with --key"):
        read_ratings([tmp_path / "away" / "filled.csv"])
    with pytest.raises(UsageError, match=r"none\.key\.json is not there"):
        read_ratings([sheet], tmp_path / "none.key.json")
    (tmp_path / "latin.csv").write_bytes("item,rating\nß,1\n".encode("latin-1"))
    with pytest.raises(UserError, match=r"latin.csv is no UTF-8 text \(byte 12\); save it as CSV in UTF-8"):
        read_ratings([tmp_path / "latin.csv"])
    (tmp_path / "quote.csv").write_text('item,rating\nbada,"1\n')
    with pytest.raises(UserError, match=r"quote.csv: row 2 is no CSV"):
        read_ratings([tmp_path / "quote.csv"])
    with pytest.raises(UsageError, match="named twice"):
        read_ratings([sheet, sheet])


def alpha_by_pairs(ratings_RI):
    """Krippendorff's, from its coincidences: every pair of an item's values counts 1 / (values - 1)."""
    items = [[v for v in column if not np.isnan(v)] for column in ratings_RI.T]
    items = [values for values in items if len(values) > 1]
    n = sum(map(len, items))
    if not n:
        return None
    observed = sum((a - b) ** 2 / (len(v) - 1) for v in items for a, b in itertools.permutations(v, 2)) / n
    every = [value for values in items for value in values]
    expected = sum((a - b) ** 2 for a, b in itertools.permutations(every, 2)) / (n * (n - 1))
    return 1 - observed / expected if expected else None


@given(st.integers(1, 4), st.lists(st.integers(0, 5), min_size=1, max_size=24))
def test_agreement_is_that_of_all_pairs(n_raters, values):
    values = [*values, *[0] * (-len(values) % n_raters)]
    ratings_RI = np.array([np.nan if value == 0 else value for value in values]).reshape(n_raters, -1)
    want = alpha_by_pairs(ratings_RI)
    got = krippendorff_alpha(ratings_RI)
    assert got is want is None or got == pytest.approx(want, abs=1e-9)
