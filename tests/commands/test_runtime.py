"""What a command says before it touches a device."""

from pathlib import Path

import pytest

from sae_jax.commands import main as cli
from sae_jax.commands import runtime
from sae_jax.types import UsageError


def test_an_idle_gpu_earns_one_warning(monkeypatch, capsys):
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    monkeypatch.setattr(Path, "exists", lambda self: str(self) == "/dev/nvidia0")
    runtime.warn_of_idle_gpu()
    said = capsys.readouterr().err.strip()
    assert "sae_jax[cuda13]" in said
    assert "\n" not in said
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")  # someone chose the CPU
    runtime.warn_of_idle_gpu()
    assert capsys.readouterr().err == ""


def test_half_told_of_other_processes_is_refused(monkeypatch):
    for name in runtime._WE_WERE_TOLD:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("JAX_NUM_PROCESSES", "2")
    with pytest.raises(UsageError, match="JAX_COORDINATOR_ADDRESS"):
        runtime.start_distributed()


@pytest.mark.parametrize(("argv", "code"), [([], 2), (["--help"], 0), (["nothing"], 2)])
def test_exit_codes(argv, code):
    assert cli.main(argv) == code


def test_a_full_disk_and_an_interrupt_are_one_line(monkeypatch, capsys):
    def full(argv):
        raise OSError(28, "No space left on device", "set/acts")

    def interrupted(argv):
        raise KeyboardInterrupt

    import sae_jax.commands.verify as command

    for run, code, words in ((full, 1, "set/acts: No space left"), (interrupted, 130, "interrupted")):
        monkeypatch.setattr(command, "run", run)
        capsys.readouterr()
        assert cli.main(["verify"]) == code
        said = capsys.readouterr().err.strip()
        assert words in said
        assert "\n" not in said
