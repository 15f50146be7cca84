"""`sae-jax fit` and `sae-jax advise` on a table with planted laws, and what bad input gets."""

import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import pytest

from sae_jax.commands import main as cli
from sae_jax.scaling import fit, forms, laws, table
from sae_jax.storage.digests import SEAL, sealed
from sae_jax.sweeps.grid import SweepConfig
from sae_jax.sweeps.plan import rates
from sae_jax.types import UserError
from tests.oracles import scaling as oracle

D_MODEL, K = 64, 8
FLOPS = 12 * D_MODEL  # of a token, for each latent
RATES = (2.5e-4, 5e-4, 1e-3, 2e-3, 4e-3)
FIGURES = ("compute", "latents", "isoflop", "joint", "rates", "active", "residuals")


def best_rate(n: float) -> float:
    return 1e-3 * math.sqrt(1024 / n)


def member(n: int, k: int, lr: float) -> list[table.Point]:
    """At every token mark up to convergence. Away from the best rate the error is larger; k scales it a little."""
    marks = [2**power for power in range(12, 13 + round(math.log2(n)))]
    spoilt = math.exp(0.02 * math.log(lr / best_rate(n)) ** 2) * (k / K) ** -0.2
    return [
        table.Point(
            name=f"n{n}k{k}lr{lr:g}",
            variant="topk",
            n_latents=n,
            k=k,
            lr=lr,
            seed=0,
            d_model=D_MODEL,
            tokens=tokens,
            steps=tokens // 64,
            flops=float(FLOPS * n * tokens),
            fvu=float(oracle.trained(np.float64(n), np.float64(tokens))) / 100 * spoilt,
            l0=float(k),
            dead_fraction=0.0,
            decoder_cosine=0.1 + 0.02 * math.log(k / K) ** 2,  # least at K
            converged=tokens == marks[-1],
            seconds=1.0,
            commit="abc",
            data="set",
            config={"sites": {"x": ["acts"], "y": ["acts"]}},
        )
        for tokens in marks
    ]


def planted() -> list[table.Point]:
    """A grid of widths, k and rates that obeys the laws of the oracle."""
    widths = [2**power for power in range(6, 14)]
    return [
        point for n in widths for k in (4, K, 16) for lr in (RATES if k == K else (1e-3,)) for point in member(n, k, lr)
    ]


@pytest.fixture(scope="module")
def points() -> list[table.Point]:
    return planted()


@pytest.fixture(scope="module")
def fitted(points, tmp_path_factory):
    """A folder that `sae-jax fit` has been through."""
    folder = tmp_path_factory.mktemp("sweep")
    table.write(folder, points)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fit, "N_DRAWS", 40)
        assert cli.main(["fit", str(folder)]) == 0
    return folder


def read(folder: Path) -> dict:
    return json.loads((folder / "fit.json").read_text())


def refit(folder: Path, points: list[table.Point], *flags: str) -> int:
    table.write(folder, points)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fit, "N_DRAWS", 8)
        return cli.main(["fit", str(folder), *flags])


def test_the_laws_are_written_with_their_intervals(fitted):
    found = read(fitted)
    assert (found["variant"], found["k"], found["d_model"]) == ("topk", K, D_MODEL)
    for name, law in [
        *((name, found[name]) for name in ("joint", "compute", "latents", "tokens", "lr")),
        ("best_latents", found["compute"]["best_latents"]),
    ]:
        for coefficient in forms.FORMS[law["form"]].coefficients:
            low, high = law["interval"][coefficient]
            assert low <= high, name
            assert math.isfinite(law[coefficient])
    assert found["tokens"]["exponent"] == pytest.approx(1.0, abs=0.1)
    low, high = found["tokens"]["interval"]["exponent"]
    assert low < 1 < high  # 4096 n tokens to convergence, or down to half as many: marks are of powers of two
    assert found["lr"]["exponent"] == pytest.approx(-0.5)
    assert found["compute"]["best_latents"]["exponent"] == pytest.approx(0.5, abs=0.05)
    assert found["flops_per_token"]["per_latent"] == pytest.approx(FLOPS)
    assert all((fitted / f"{name}.png").stat().st_size for name in FIGURES)


def test_the_report_says_the_same(fitted):
    said = (fitted / "fit.txt").read_text()
    assert "topk of acts at k=8" in said
    assert f"{read(fitted)['compute']['exponent']:.5g}" in said
    assert "that the error does not fall to nought has a probability of" in said
    assert "learning rate at n_latents=32768: 0.000177" in said


def test_a_sweep_takes_the_rule_for_the_rate_as_it_is_written(fitted):
    rule = rates(SweepConfig(lr_from=str(fitted / "fit.json")))
    assert rule(4096) == pytest.approx(best_rate(4096))


def test_a_rule_that_has_changed_since_is_refused(fitted, tmp_path):
    content = json.loads((fitted / "fit.json").read_text())
    content["lr"]["coefficient"] *= 10
    (tmp_path / "fit.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"fit\.json: not what was written, its digest differs"):
        rates(SweepConfig(lr_from=str(tmp_path / "fit.json")))


def test_advice_follows_the_laws(fitted, capsys):
    flops = 1e12
    words = ["advise", f"--compute={flops}", f"--fit={fitted / 'fit.json'}", "--target=h200:8"]
    assert cli.main(words) == 0
    said = capsys.readouterr().out
    n = 2 ** round(math.log2(oracle.best_width(np.float64(flops / FLOPS))))
    assert f"{n} (the law says" in said
    assert f"{flops / FLOPS / n:,.0f}" in said
    assert f"{best_rate(n):.3g}" in said
    assert "time on h200:8" in said
    assert "times the largest" not in said


def test_advice_goes_on_with_the_rates_of_the_points_where_none_was_searched(points, tmp_path, capsys):
    own = [
        p for p in points if p.k == K and p.lr == min(RATES, key=lambda lr: abs(math.log(lr / best_rate(p.n_latents))))
    ]
    assert refit(tmp_path, [dataclasses.replace(p, lr=10 * p.lr) for p in own]) == 0  # far from the default
    capsys.readouterr()
    assert cli.main(["advise", "--compute=1e12", f"--fit={tmp_path / 'fit.json'}"]) == 0
    said = next(line for line in capsys.readouterr().out.splitlines() if "learning rate" in line)
    n = 2 ** round(math.log2(oracle.best_width(np.float64(1e12 / FLOPS))))
    assert "no rule" in said
    assert float(said.split("learning rate")[1].split()[0]) == pytest.approx(10 * best_rate(n), rel=0.3)


def test_advice_beyond_the_points_says_how_far(fitted, points, capsys):
    dearest = max(point.flops for point in points)
    assert cli.main(["advise", f"--compute={100 * dearest}", f"--fit={fitted / 'fit.json'}"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "times the largest that was fitted, so this is a guess" in said
    largest = read(fitted)["compute"]["range"]["x"][1]
    assert cli.main(["advise", f"--compute={3 * largest}", f"--fit={fitted / 'fit.json'}"]) == 0
    assert "guess" not in capsys.readouterr().out


@pytest.mark.long
def test_where_decoder_rows_are_least_alike_is_told_and_advised(fitted, points, tmp_path, capsys):
    assert f"{K}, or anywhere from 4 to 16" in (fitted / "fit.txt").read_text()
    words = ["advise", "--compute=1e10", f"--fit={fitted / 'fit.json'}"]
    assert cli.main([*words, "--k=16"]) == 0
    said = capsys.readouterr().out
    assert f"decoder rows are least alike at k={K}, 0.5 times this k, or anywhere from 4 to 16" in said
    rising = [dataclasses.replace(p, decoder_cosine=0.1 + p.k / 100) for p in points if p.k]
    assert refit(tmp_path, rising) == 0
    assert "not between the k tried: below 8" in (tmp_path / "fit.txt").read_text()
    capsys.readouterr()
    assert cli.main(["advise", "--compute=1e10", f"--fit={tmp_path / 'fit.json'}"]) == 0
    assert "decoder rows" not in capsys.readouterr().out


@pytest.mark.long
def test_the_smallest_that_are_off_do_not_count_and_are_said(points, tmp_path, capsys):
    """As "smallest fall off the trend" (Gao et al. 2024, 3.1); unless all are to count."""
    spoilt = [dataclasses.replace(p, fvu=1.2 * p.fvu) if p.n_latents <= 128 else p for p in points]
    assert refit(tmp_path, spoilt) == 0
    found = read(tmp_path)
    assert found["latents"]["range"]["x"] == [256, 8192]
    assert any(w.startswith("latents: the smallest 2 (64, 128) are off the law") for w in found["warnings"])
    assert refit(tmp_path, spoilt, "--leave-out=0") == 0
    found = read(tmp_path)
    assert found["latents"]["range"]["x"] == [64, 8192]
    assert any("--leave-out=2 is due" in warning for warning in found["warnings"])
    assert refit(tmp_path, points, "--leave-out=3") == 0
    assert read(tmp_path)["latents"]["range"]["x"] == [512, 8192]
    capsys.readouterr()
    assert refit(tmp_path, points, "--leave-out=-1") == 2
    assert "--leave-out=-1 must be at least 0" in capsys.readouterr().err


def test_a_lucky_point_is_named_and_does_not_count(points, tmp_path):
    at = next(i for i, p in enumerate(points) if (p.n_latents, p.k, p.tokens) == (1024, K, 2**18))
    lucky = [dataclasses.replace(p, fvu=0.7 * p.fvu) if i == at else p for i, p in enumerate(points)]
    clean, found = laws.study(points), laws.study(lucky)
    assert any(f"compute: {points[at].name} at 262,144 tokens is -" in warning for warning in found.warnings)
    assert found.laws["compute"].law.coefficients == pytest.approx(clean.laws["compute"].law.coefficients, rel=0.02)


def test_another_k_goes_by_the_joint_law(fitted, capsys):
    def error(k: int) -> float:
        assert cli.main(["advise", "--compute=1e10", f"--fit={fitted / 'fit.json'}", f"--k={k}"]) == 0
        said = next(line for line in capsys.readouterr().out.splitlines() if "FVU expected" in line)
        return float(said.split("FVU expected")[1].split()[0].rstrip(","))

    assert error(16) / error(K) == pytest.approx(2**-0.2, rel=0.05)


def test_another_k_without_a_joint_law_is_refused(fitted, tmp_path, capsys):
    path = tmp_path / "fit.json"
    content = {name: value for name, value in read(fitted).items() if name != SEAL}
    path.write_text(json.dumps(sealed({**content, "joint": None})))
    assert cli.main(["advise", "--compute=1e10", f"--fit={path}", "--k=16"]) == 2
    assert "fit with --k=16" in capsys.readouterr().err


def test_laws_that_the_points_do_not_support_are_left_out_with_the_reason(points, tmp_path, capsys):
    """Two widths, one k, one rate, no convergence."""
    few = [p for p in points if p.n_latents in (64, 128) and p.k == 4 and not p.converged]
    assert refit(tmp_path, few) == 0
    found = read(tmp_path)
    assert [found[name] for name in ("joint", "latents", "tokens", "lr")] == [None] * 4
    for name in ("joint", "latents", "tokens", "lr", "best_latents"):
        assert any(warning.startswith(f"{name}: left out") for warning in found["warnings"])
    assert not (tmp_path / "joint.png").exists()
    capsys.readouterr()
    assert cli.main(["advise", "--compute=1e12", f"--fit={tmp_path / 'fit.json'}"]) == 1
    assert "best_latents: left out: 0 of" in capsys.readouterr().err


def test_a_table_of_bare_points_is_fitted_and_advised_by(points, tmp_path, capsys):
    """Made by something else: no member names, no width of the rows, no site."""
    kept = ("n_latents", "k", "lr", "seed", "tokens", "flops", "fvu")
    bare = [table.Point.from_json({name: getattr(point, name) for name in kept}) for point in points]
    assert refit(tmp_path, bare) == 0
    capsys.readouterr()
    words = ["advise", "--compute=1e10", f"--fit={tmp_path / 'fit.json'}"]
    assert cli.main(words) == 0
    said = capsys.readouterr().out
    assert "set on disk" not in said
    assert "decoder rows" not in said
    assert not (tmp_path / "active.png").exists()
    assert cli.main([*words, "--target=h200:8"]) == 2
    assert "has no d_model" in capsys.readouterr().err


def test_one_point_is_no_crash(points, tmp_path):
    assert refit(tmp_path, points[:1]) == 0
    assert read(tmp_path)["compute"] is None


def test_without_convergence_errors_are_compared_at_the_tokens_that_all_have(points, tmp_path):
    assert refit(tmp_path, [p for p in points if not p.converged]) == 0
    last = 2 ** (12 + 6 - 1)  # of the narrowest, but for its last
    assert f"at {last:,} tokens" in read(tmp_path)["latents"]["note"]


@pytest.mark.long
def test_errors_are_compared_at_as_many_tokens_a_latent_as_asked(points, tmp_path):
    assert refit(tmp_path, points, "--tokens-per-latent=63") == 0  # a mark of every width is at 64
    study = laws.study(points, tokens_per_latent=63)
    n = 2.0 ** np.arange(6, 14)
    best = [min(p.fvu for p in points if (p.n_latents, p.k, p.tokens) == (int(each), K, 64 * int(each))) for each in n]
    np.testing.assert_array_equal(study.laws["latents"].x[0], n)
    np.testing.assert_array_equal(study.laws["latents"].y, best)
    assert read(tmp_path)["latents"]["note"] == "8 widths at 63 tokens a latent"
    assert "24 pairs of n and k at 63 tokens a latent" in (tmp_path / "fit.txt").read_text()
    few = [p for p in points if p.n_latents > 64 or p.tokens > 64 * 64]
    assert "1 of 8 were not measured there" in laws.study(few, tokens_per_latent=64).laws["latents"].note


def test_tokens_a_latent_that_no_point_has_are_said(points, tmp_path):
    assert refit(tmp_path, points, "--tokens-per-latent=50") == 0
    assert "joint: left out: no point is at 50 tokens a latent, to 5%" in read(tmp_path)["warnings"]


@pytest.mark.parametrize(
    ("change", "flags", "code", "said"),
    [
        (lambda rows: rows, ["--k=7"], 2, "--k=7: no point has it; the table has 4, 8, 16"),
        (lambda rows: rows, ["--variant=relu"], 2, "the table has topk"),
        (lambda rows: rows, ["--site=mlp"], 2, "the table has acts"),
        (lambda rows: rows, ["--tokens-per-latent=0"], 2, "--tokens-per-latent=0.0 must be above 0"),
        (lambda rows: [{**rows[0], "data": "other"}, *rows[1:]], [], 1, "points of data other and set"),
        (
            lambda rows: [{**rows[0], "fvu": -1.0}, *rows[1:]],
            [],
            1,
            "line 1 (member n1024k16lr0.001, tokens 4096): fvu=-1.0",
        ),
        (lambda rows: [rows[0], *rows], [], 1, "line 2 (member n1024k16lr0.001, tokens 4096): the same point"),
        (lambda rows: [], [], 1, "holds no points"),
    ],
)
def test_a_bad_table_is_refused_in_one_line(points, tmp_path, capsys, change, flags, code, said):
    rows = [point.to_json() for point in sorted(points, key=lambda point: point.key)]
    (tmp_path / table.FILE).write_text("".join(json.dumps(row) + "\n" for row in change(rows)))
    assert cli.main(["fit", str(tmp_path), *flags]) == code
    errors = capsys.readouterr().err.strip()
    assert said in errors
    assert "\n" not in errors
    assert not (tmp_path / "fit.json").exists()


@pytest.mark.parametrize(
    ("flags", "code", "said"),
    [
        (["--compute=0"], 2, "must be above 0"),
        (["--compute=1e12", "--fit=nowhere.json"], 2, "sae-jax fit DIR"),
        (["--compute=1e12", "--target=h200:9"], 2, "h200:8"),
        (["--compute=1e12", "--mfu=2"], 2, "at most 1"),
        (["--compute=1e12", "--k=0"], 2, "at least 1"),
        (["--compute=1"], 1, "spend more"),
    ],
)
def test_bad_questions_get_one_line(fitted, capsys, flags, code, said):
    file = [] if any(flag.startswith("--fit") for flag in flags) else [f"--fit={fitted / 'fit.json'}"]
    assert cli.main(["advise", *flags, *file]) == code
    errors = capsys.readouterr().err.strip()
    assert said in errors
    assert "\n" not in errors


def test_a_fit_that_is_none_is_refused(tmp_path, capsys):
    path = tmp_path / "fit.json"
    path.write_text(json.dumps(sealed({"compute": {"exponent": 1}})))
    assert cli.main(["advise", "--compute=1e12", f"--fit={path}"]) == 1
    assert "not what `sae-jax fit` writes" in capsys.readouterr().err


def test_a_fit_with_another_digit_is_refused(fitted, tmp_path, capsys):
    text = (fitted / "fit.json").read_text()
    digit = text.index("exponent") + len('exponent": 0.')
    (tmp_path / "fit.json").write_text(text[:digit] + str((int(text[digit]) + 1) % 10) + text[digit + 1 :])
    assert cli.main(["advise", "--compute=1e12", f"--fit={tmp_path / 'fit.json'}"]) == 1
    assert "fit.json: not what was written, its digest differs" in capsys.readouterr().err
