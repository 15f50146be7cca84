"""What a command says before it touches a device."""

import fnmatch
import os
import signal
import sys
from pathlib import Path

import pytest

from sae_jax.commands import gpu, joining, runtime, signals
from sae_jax.commands import main as cli
from sae_jax.types import UsageError
from tests import runs


def test_an_idle_gpu_earns_one_warning(monkeypatch, capsys):
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    monkeypatch.setattr(Path, "exists", lambda self: str(self) == "/dev/nvidia0")
    gpu.warn_of_idle_gpu()
    said = capsys.readouterr().err.strip()
    assert "sae_jax[cuda13]" in said
    assert "\n" not in said
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")  # someone chose the CPU
    gpu.warn_of_idle_gpu()
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("jaxlib", "devices", "added"),
    [
        ("0.10.2", ["nvidia0"], True),
        ("0.11.0", ["dxg"], True),
        ("0.11.1", ["nvidia0"], False),
        ("0.12.0.1", ["nvidia0"], False),
        ("0.10.2", ["nvidiactl"], False),
    ],
)
def test_commands_mend_atomic_sums_on_gpus_before_jax_starts(monkeypatch, jaxlib, devices, added):
    monkeypatch.setenv("XLA_FLAGS", "--xla_abc=1")
    monkeypatch.setattr("importlib.metadata.version", lambda name: jaxlib)
    monkeypatch.setattr(Path, "glob", lambda self, pattern: (d for d in devices if fnmatch.fnmatch(d, pattern)))
    for _ in range(2):
        gpu.set_gpu_flags()
        expected = "--xla_abc=1" + added * " --xla_backend_extra_options=-nvptx-allow-ftz-atomics"
        assert os.environ["XLA_FLAGS"] == expected


def test_half_told_of_other_processes_is_refused(monkeypatch):
    for name in joining.TOLD:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("JAX_NUM_PROCESSES", "2")
    with pytest.raises(UsageError, match="JAX_COORDINATOR_ADDRESS"):
        joining.find_job()


@pytest.mark.parametrize(("argv", "code"), [([], 2), (["--help"], 0), (["nothing"], 2)])
def test_exit_codes(argv, code):
    assert cli.main(argv) == code


def test_what_is_no_bug_is_one_line(monkeypatch, capsys):
    def full(argv):
        raise OSError(28, "No space left on device", "set/acts")

    def interrupted(argv):
        raise KeyboardInterrupt

    import sae_jax.commands.verify as command

    def not_a_folder(argv):
        raise NotADirectoryError(20, "Not a directory", "file.txt/x")

    def too_large(argv):
        raise type("JaxRuntimeError", (RuntimeError,), {})("RESOURCE_EXHAUSTED: Out of memory\nand pages more")

    for run, code, words in (
        (full, 1, "set/acts: No space left"),
        (interrupted, 130, "interrupted; the same command starts over"),
        (not_a_folder, 2, "file.txt/x: Not a directory; choose another path"),
        (too_large, 1, "Out of memory; use a smaller sae.n_latents"),
    ):
        monkeypatch.setattr(command, "run", run)
        capsys.readouterr()
        assert cli.main(["verify"]) == code
        said = capsys.readouterr().err.strip()
        assert words in said
        assert "\n" not in said


def test_the_others_are_left_whatever_the_exception(monkeypatch):
    import sae_jax.commands.verify as command

    def bug(argv):
        raise ZeroDivisionError

    left = []
    monkeypatch.setattr(runtime, "leave_the_others", left.append)
    monkeypatch.setattr(command, "run", bug)
    with pytest.raises(ZeroDivisionError):
        cli.main(["verify"])
    assert left == [1]


def test_ctrl_c_in_a_process_that_trains_is_no_crash(small_set, tmp_path):
    run = tmp_path / "run"
    process = runs.start(runs.train_command(small_set, run, "--train.steps=1000000"))
    runs.wait_for(run.exists, process)  # it compiles
    process.send_signal(signal.SIGINT)
    code, said = runs.finish(process)
    assert code == signals.INTERRUPTED, said
    assert "the same command resumes from what is on disk" in said
    assert "Traceback" not in said


CTRL_C_IN_A_CALLBACK = """
import gc, signal, sys, time
from sae_jax.commands import harvest, main, runtime

send = signal.pthread_kill

def once(phase, info):
    gc.callbacks.remove(once)
    signal.raise_signal(signal.SIGINT)

def run(argv):
    runtime.start_distributed()
    signal.pthread_kill = too_early
    gc.callbacks.append(once)
    gc.collect()
    time.sleep(3600)

def too_early(thread, number):  # just before the sleep begins
    signal.pthread_kill = send

harvest.run = run
sys.argv[1:] = ["harvest"]
main.main()
"""


def test_ctrl_c_is_not_lost_in_a_callback():
    """Python prints and forgets what is raised while the garbage collector calls back, as it does into JAX."""
    code, said = runs.finish(runs.start([sys.executable, "-c", CTRL_C_IN_A_CALLBACK]))
    assert code == signals.INTERRUPTED, said
    assert "Traceback" not in said


@pytest.mark.slow
@pytest.mark.parametrize("n", [1, 2])
def test_a_run_that_was_stopped_leaves_with_the_code_that_a_launcher_asks_for(small_set, tmp_path, monkeypatch, n):
    monkeypatch.setenv(signals.STOPPED_CODE, "75")
    run = tmp_path / "run"
    words = runs.train_command(small_set, run, "--train.steps=1000000")
    process = runs.start(words if n == 1 else runs.local(n, words))
    runs.wait_for(lambda: run.exists() and runs.step_of(run) > 3, process)
    process.send_signal(signal.SIGTERM)
    code, said = runs.finish(process)
    assert code == 75, said
    assert said.count("stopped by SIGTERM at step") == 1
    assert "Traceback" not in said
    assert runs.attempts(run)[-1]["outcome"] == "preempted"
    end = runs.step_of(run)
    runs.complete(runs.train_command(small_set, run, f"--train.steps={end + 5}"))  # 0 at its end


def test_a_code_that_is_none_is_said(monkeypatch, capsys):
    for text, code in (("75", 75), ("0", 0), ("256", 1), ("-1", 1), ("all", 1)):
        monkeypatch.setenv(signals.STOPPED_CODE, text)
        assert signals.stopped_code() == code
    assert capsys.readouterr().err.count("must be a number from 0 to 255") == 3
