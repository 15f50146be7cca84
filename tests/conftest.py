"""Test set-up: eight CPU devices, JAX as strict as it can be, and one run that several tests compare theirs with."""

import os
import secrets
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path

# Eight CPU devices, also where there is a GPU. JAX_PLATFORMS=cuda tries what one GPU can do: the tests that need more
# devices fail there, and references, which are written plainly, have their float32 products in full precision.
os.environ.setdefault("JAX_PLATFORMS", "cpu")

# Before JAX starts, which reads it once. On a busy machine eight devices may not meet within the usual 40 s. Most of
# the tests' time would be the compiler's, so it optimises little, as it does in most of the processes of runs.py.
if os.environ["JAX_PLATFORMS"] == "cpu":
    os.environ["XLA_FLAGS"] = (
        f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"
        " --xla_cpu_collective_call_terminate_timeout_seconds=250 --xla_backend_optimization_level=0"
        " --xla_backend_extra_options=xla_cpu_disable_new_fusion_emitters"
    )
else:
    os.environ.setdefault("JAX_DEFAULT_MATMUL_PRECISION", "highest")

# A program is compiled once for all tests of a session: in both of its workers, which inherit this, and in what they
# start. The folder goes with the process that made it.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    COMPILED = tempfile.TemporaryDirectory(prefix="compiled-")
    os.environ["JAX_COMPILATION_CACHE_DIR"] = COMPILED.name
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"

import hypothesis
import jax
import pytest

from sae_jax import progress
from tests import runs, s3

# What a shell starts in the background has Ctrl-C ignored, and so would the commands that tests interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)

# How long an example takes says more of the machine than of the code.
hypothesis.settings.register_profile("unhurried", deadline=None)
hypothesis.settings.load_profile("unhurried")

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")


@pytest.fixture(autouse=True)
def nothing_said_yet() -> None:
    """What a process says once is said in every test."""
    progress.say_once.cache_clear()


@pytest.fixture(scope="session")
def s3_port() -> Iterator[int]:
    """Of an S3 on this machine."""
    with s3.emulator() as port:
        yield port


@pytest.fixture
def door(s3_port: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[s3.Door]:
    """What stands before it; this process and those that it starts ask there."""
    door = s3.Door(s3_port)
    for name, value in door.env.items():
        monkeypatch.setenv(name, value)
    yield door
    door.close()


@pytest.fixture
def bucket(door: s3.Door) -> str:
    """URL of an empty place at it."""
    return f"s3://{s3.BUCKET}/{secrets.token_hex(4)}"


@pytest.fixture(scope="module")
def one_device() -> Iterator[None]:
    """As on a laptop: programs for one compile in two thirds of the time. What splits over many is tested apart."""
    device = jax.devices()[:1]
    with pytest.MonkeyPatch.context() as patch:
        for name in ("devices", "local_devices"):
            patch.setattr(jax, name, lambda *args, **kwargs: device)
        for name in ("device_count", "local_device_count"):
            patch.setattr(jax, name, lambda *args, **kwargs: 1)
        yield


@pytest.fixture(scope="session")
def small_set(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small activation set on disk."""
    return runs.write_set(tmp_path_factory.mktemp("set") / "set")


@pytest.fixture(scope="session")
def uninterrupted(small_set: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on one device that nothing disturbed."""
    run = tmp_path_factory.mktemp("uninterrupted") / "run"
    runs.complete(runs.train_command(small_set, run, "--train.checkpoint-every=100"))
    return run


@pytest.fixture(scope="session")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled language model after a change of one layer, as a folder."""
    return runs.write_tuned(tmp_path_factory.mktemp("tuned") / "lm")
