"""What an optimised program holds, read from its text."""

from __future__ import annotations

import math
import re

import numpy as np

# f32[16,64]{1,0}, bf16[], pred[8]: a type, its dimensions; bounded dynamic ones print as <=64.
_ARRAY = re.compile(r"\b(?:pred|bf16|f8\w*|[sufc]\d+)\[([\d,<=]*)\]")


def largest_array(text: str) -> int:
    """Elements of the largest array that `compiled.as_text()` names on a device, arguments and results included.

    Values inside a fusion count too although they get no buffer, so the answer may be too large, never too small.
    """
    shapes = (found.replace("<=", "").split(",") for found in _ARRAY.findall(text))
    return max((math.prod(int(size) for size in shape if size) for shape in shapes), default=0)


def collectives(text: str) -> list[tuple[str, list[set[int]]]]:
    """(shape of the result, the groups of devices that exchange something) of each collective."""
    found = re.findall(r"= (.*?) (?:all-|reduce-sc|collective-)[\w-]*\(.*?replica_groups=(.*)", text)
    return [(shape, _groups(rest)) for shape, rest in found]


def rounded_products(lowered: str) -> list[str]:
    """Products of float32 numbers in the text of a program before XLA, for which a GPU or TPU may round them first."""
    products = [line for line in lowered.splitlines() if re.search(r"stablehlo\.(dot_general|dot|convolution)\b", line)]
    assert products
    return [line for line in products if re.search(r"\(tensor<[\dx]*f32>", line) and "HIGHEST" not in line]


def _groups(text: str) -> list[set[int]]:
    """What begins `{{0,1},{2,3}}`, `[2,2]<=[4]`, `[2,2]<=[2,2]T(1,0)` or `mesh['a'=2,'b'=2] {'b'}`."""
    if listed := re.match(r"\{\{[\d,{}]*\}\}", text):
        return [set(map(int, group.split(","))) for group in re.findall(r"\{([\d,]+)\}", listed[0])]
    if tiled := re.match(r"\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text):
        sizes, shape, order = ([int(n) for n in part.split(",")] if part else None for part in tiled.groups())
        return [set(group) for group in np.arange(math.prod(shape)).reshape(shape).transpose(order).reshape(sizes)]
    mesh, names = re.match(r"mesh\[([^\]]+)\] \{([^}]+)\}", text).groups()
    axes = {name: int(size) for name, size in re.findall(r"('\w+')=(\d+)", mesh)}
    assert set(names.split(",")) <= set(axes), text
    devices = np.arange(math.prod(axes.values())).reshape(*axes.values())
    along = [list(axes).index(name) for name in names.split(",")]
    size = math.prod(axes[name] for name in names.split(","))
    return [set(group) for group in np.moveaxis(devices, along, range(-len(along), 0)).reshape(-1, size)]
