"""The page of an evaluation: it holds every number, stands alone, and shows names as text."""

import re

from sae_jax.pages.evaluation import write_report

DOCUMENT = {
    "text": "held<out>",
    "sites": {"x": ["resid_post.1"], "y": ["resid_post.1"]},
    "fvu": 0.125,
    "kl": 0.5,
    "fvu_by_position": {"0": 0.1, "1": 0.2, "2 to 3": None},
    "density_histogram": {"log10_edges": [-2.0, -1.0, 0.0], "counts": [3, 0]},
    "silent_fraction": 0.25,
    "steering_ce": {"0": 0.1, "2": 0.3, "5": 0.9},
    "intervals": {"kl": [0.4, 0.6], "fvu_by_position": {"0": [0.05, 0.15]}, "steering_ce": {"2": [0.2, 0.4]}},
}


def test_a_page_has_every_number_its_interval_and_what_was_left_out(tmp_path):
    path = tmp_path / "page.html"
    other = {"fvu": None, "mmcs": {"a<b>": 0.75}, "intervals": {}, "left_out": {"importance": "it runs in torch"}}
    write_report(path, {"a<b>": DOCUMENT, "other": other})
    page = path.read_text()
    assert "<b>" not in page
    assert "held&lt;out&gt;" in page
    assert "0.3000 [0.2000, 0.4000]" in page
    reasons = dict(re.findall("<dt>([^<]*)</dt><dd>([^<]*)</dd>", page.partition("Without an interval")[2]))
    assert "KL" not in reasons
    assert reasons["silent"].startswith("counted on these rows")
    assert reasons["MMCS"].startswith("of the weights")
    assert reasons["FVU"].startswith("undefined, or of one alone")
    for said in ("0.1250", "0.5000 [0.4000, 0.6000]", "undefined", "0.7500", "other: importance", "it runs in torch"):
        assert said in page
    assert len(re.findall("data:image/svg.xml;base64,", page)) == 3
    assert not re.search(r'(src|href)="(?!data:)', page)


def test_a_page_without_intervals_or_curves_has_no_empty_figure(tmp_path):
    path = tmp_path / "page.html"
    write_report(path, {"a": {"fvu": 0.5, "intervals": {}}})
    assert "<img" not in path.read_text()
