"""What a wheel holds: the demo runs from it, with no clone in sight."""

import shutil
import subprocess
import sys
import zipfile

import pytest

import sae_jax
from tests import runs


@pytest.mark.slow
def test_a_wheel_installed_elsewhere_runs_the_demo(tmp_path):
    pytest.importorskip("setuptools", minversion="77")
    source, site = tmp_path / "source", tmp_path / "site"
    for name in ("sae_jax", "configs"):
        shutil.copytree(runs.ROOT / name, source / name, symlinks=True)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(runs.ROOT / name, source)
    build = ["-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir"]
    subprocess.run([sys.executable, *build, tmp_path, source], check=True, cwd=tmp_path)
    zipfile.ZipFile(next(tmp_path.glob("*.whl"))).extractall(site)
    shutil.rmtree(source)

    elsewhere = {"cwd": tmp_path, "env": runs.environment() | {"PYTHONPATH": str(site)}, "text": True}
    words = [sys.executable, "-m", "sae_jax.commands.main"]
    said = subprocess.run([*words, "--version"], capture_output=True, check=True, **elsewhere).stdout
    assert said == f"sae-jax {sae_jax.__version__}\n"
    assert (site / "sae_jax" / "py.typed").exists()

    with subprocess.Popen([*words, "demo", "--out", "demo"], stderr=subprocess.PIPE, **elsewhere) as process:
        assert process.stderr.readline().startswith("first sequences: ")
        process.kill()
