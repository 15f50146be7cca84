"""Targets: what a name means, and what names that mean nothing are told."""

import pytest

from sae_jax.planning import targets
from sae_jax.types import UsageError


@pytest.mark.parametrize(
    ("name", "n_devices"),
    [
        *(("v5p:8x8x8", 512), ("v6e:16x16", 256), ("v4:2x2x1", 8), ("tpu7x:4x4x4", 128), ("v5e:1x1", 1)),
        *(("rtx4090:1", 1), ("a100:8", 8), ("h100:4", 4), ("h200:64", 64)),
    ],
)
def test_devices_are_counted_as_jax_counts_them(name, n_devices):
    target = targets.parse(name)
    assert target.n_devices == n_devices
    assert target.is_tpu == (name[0] in "vt")
    assert target.usable_bytes < target.chip.memory_bytes


def test_gpus_stand_in_nodes_of_eight():
    assert targets.parse("h200:4").topology["topology"] == "1x1x4"
    assert targets.parse("h200:64").topology["topology"] == "1x8x8"


@pytest.mark.parametrize(("name", "capability"), [("a100:1", (8, 0)), ("rtx4090:1", (8, 9)), ("h100:1", (9, 0))])
def test_the_compiler_is_told_which_gpu_it_is(name, capability):
    text = targets.parse(name).topology["target_config"]
    assert "cuda_compute_capability {{ major: {} minor: {} ".format(*capability) in text
    assert f"device_memory_size: {targets.parse(name).chip.memory_bytes}\n" in text


@pytest.mark.parametrize(
    ("name", "cure"),
    [
        ("v9:2x2", "there are v4, v5e"),
        ("", "there are v4, v5e"),
        ("v5p:8x8", "3 numbers of chips, such as v5p:4x4x4"),
        ("v6e:16x16x16", "such as v6e:4x4"),
        ("v5e:0x2", "such as v5e:4x4"),
        ("h200", "whole nodes of 8: h200:8"),
        ("h200:20", "whole nodes of 8: h200:16"),
        ("h200:2x4", "h200:8"),
    ],
)
def test_a_name_that_means_nothing_is_told_what_does(name, cure):
    with pytest.raises(UsageError, match=cure) as said:
        targets.parse(name)
    assert "\n" not in str(said.value)
