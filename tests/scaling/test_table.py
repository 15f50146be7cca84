"""The table of a sweep: what is written is read, and a damaged one is refused by file, line and point."""

import dataclasses
import json

import pytest

from sae_jax.scaling import table
from sae_jax.types import UsageError, UserError

POINT = table.Point(
    name="n256k4",
    variant="topk",
    n_latents=256,
    k=4,
    lr=1e-3,
    seed=0,
    d_model=64,
    tokens=4096,
    steps=8,
    flops=1.5e9,
    fvu=0.25,
    l0=4.0,
    dead_fraction=0.0,
    converged=False,
    seconds=1.25,
    commit="abc",
    data="set",
    config={"sae": {"k": 4}},
)
LATER = dataclasses.replace(POINT, tokens=8192, fvu=0.2, converged=True)
WIDE = dataclasses.replace(POINT, name="n1024", n_latents=1024, k=None)


def test_what_is_written_is_read_sorted(tmp_path):
    table.write(tmp_path, [LATER, POINT, WIDE])
    assert table.read(tmp_path) == [WIDE, POINT, LATER]
    assert len((tmp_path / table.FILE).read_text().splitlines()) == 3


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('{"name": "n256k4", "tok', "damaged"),
        ("[1, 2]", "damaged"),
        ({"fvu": None}, r"member n256k4, tokens 8192.*fvu=None is not a number"),
        ({"fvu": float("nan")}, "not valid JSON"),
        ({"fvu": 0.0}, "fvu=0.0 must be above 0"),
        ({"flops": -1.0}, "flops=-1.0 must be above 0"),
        ({"tokens": 0}, "tokens=0 must be above 0"),
        ({"tokens": True}, "tokens=True is not a whole number"),
        ({"k": 300}, "k=300 must be from 1 to n_latents=256"),
        ({"converged": 1}, "converged=1 is not true or false"),
        ({"tokens": 4096}, "tokens 4096.*the same point stands in line 1"),
        ({"fvu": ...}, "lacks fvu"),
    ],
)
def test_a_line_that_is_no_point_is_named(tmp_path, line, said):
    table.write(tmp_path, [POINT])
    if isinstance(line, dict):
        values = {**LATER.to_json(), **line}
        line = json.dumps({name: value for name, value in values.items() if value is not ...})
    with (tmp_path / table.FILE).open("a") as file:
        file.write(line + "\n")
    with pytest.raises(UserError, match=rf"results\.jsonl, line 2.*{said}") as caught:
        table.read(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_digit_that_has_changed_is_found(tmp_path):
    """It would make another law. A line without a digest is of a table that something else wrote."""
    table.write(tmp_path, [POINT, LATER])
    text = (tmp_path / table.FILE).read_text()
    (tmp_path / table.FILE).write_text(text.replace('"fvu": 0.2,', '"fvu": 0.6,'))
    with pytest.raises(UserError, match=r"line 2 .*tokens 8192\): not what was written, its digest differs"):
        table.read(tmp_path)
    (tmp_path / table.FILE).write_text(json.dumps(dataclasses.asdict(POINT)))
    assert table.read(tmp_path) == [POINT]


def test_no_table_and_an_empty_one_are_refused(tmp_path):
    with pytest.raises(UsageError, match="sae-jax sweep"):
        table.read(tmp_path)
    table.write(tmp_path, [])
    with pytest.raises(UserError, match="holds no points"):
        table.read(tmp_path)
