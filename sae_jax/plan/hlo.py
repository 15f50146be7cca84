"""What a step does, read from the text of its compiled program.

The program is walked from its entry, every computation as often as it runs, so that what stands in a loop counts once
a trip. Of a conditional all branches count: the figures are those of the busiest step. Traps:

- GPU programs carry a loop's trip count; in TPU programs it is the constant that the loop's condition compares with.
  The length of a loop that depends on data is in neither: its body counts once, and `open_loops` says so.
- An asynchronous collective is two instructions, start and done. It counts where it is done.
- A TPU's `all-reduce-scatter` is a fusion around an all-reduce that moves what a reduce-scatter moves, and is one.
- Operands are names; their shapes stand where they are made.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")

_BITS = {"pred": 8, "bf16": 16, "c64": 64, "c128": 128}  # other types end in their number of bits
_ARRAY = re.compile(r"\b(pred|bf16|f8\w*|[sufc]\d+)\[([\d,]*)\]")
_HEAD = re.compile(r"^(ENTRY )?%?([\w.\-]+) (?:\(.*)?\{$")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%([\w.\-]+) = (.*)$")
_CALLED = re.compile(r"\b(?:calls|to_apply|branch_computations|called_computations|true_computation|false_computation)=")
_REDUCE_SCATTER = "all-reduce-scatter"
_NO_BUFFER = ("parameter", "get-tuple-element", "tuple", "bitcast", "constant", "while", "conditional", "call")


@dataclass
class Collective:
    """All collectives of one kind in one run of the program, on one device."""

    kind: str
    count: int = 0
    bytes: int = 0  # of each, the larger of what goes in and what comes out


@dataclass
class Buffer:
    """An array that the program holds at some time."""

    shape: str
    bytes: int
    origin: str  # the operation in the source that asked for it


@dataclass
class Program:
    """What one device does in one run of the program."""

    collectives: dict[str, Collective] = field(default_factory=dict)
    matmul_flop: int = 0  # of products; element-wise work and sums are left out
    sorts: int = 0
    open_loops: int = 0  # loops whose length depends on data; their bodies count once
    largest: list[Buffer] = field(default_factory=list)


@dataclass
class _Instruction:
    name: str
    shape: str  # of the result
    opcode: str
    operands: list[str]
    text: str  # all of it
    is_root: bool


def analyse(text: str, n_largest: int = 5) -> Program:
    """The program that `compiled.as_text()` prints."""
    computations, entry = _parse(text)
    program = Program()
    buffers: dict[str, Buffer] = {}
    for computation, times, inside_fusion in _walk(computations, entry, 1, program):
        shapes = {i.name: i.shape for i in computation}
        starts = {i.name: i for i in computation}
        for i in computation:
            if (collective := _collective(i)) is not None:
                source = starts[i.operands[0]] if i.opcode.endswith("-done") else i
                taken = sum(_bytes(shapes.get(name, "")) for name in source.operands)
                total = program.collectives.setdefault(collective, Collective(collective))
                total.count += times
                total.bytes += times * max(taken, _bytes(i.shape))
            elif i.opcode in ("dot", "convolution"):
                program.matmul_flop += times * _product_flop(i, shapes)
            elif i.opcode == "sort" or "RadixSort" in i.text:
                program.sorts += 1
            if not inside_fusion and i.opcode not in _NO_BUFFER and not i.opcode.endswith("-start"):
                for kind, dimensions in _ARRAY.findall(i.shape):
                    shape = f"{kind}[{dimensions}]"
                    buffers.setdefault(shape, Buffer(shape, _bytes(shape), _origin(i.text)))
    program.largest = sorted(buffers.values(), key=lambda buffer: -buffer.bytes)[:n_largest]
    return program


def _parse(text: str) -> tuple[dict[str, list[_Instruction]], str]:
    """Computations by name, and the name of the first to run."""
    computations: dict[str, list[_Instruction]] = {}
    entry, body = "", None
    for line in text.splitlines():
        if body is None:
            if head := _HEAD.match(line):
                body = computations[head[2]] = []
                entry = head[2] if head[1] else entry
        elif line.startswith("}"):
            body = None
        elif found := _INSTRUCTION.match(line):
            shape, rest = _split_shape(found[3])
            opcode, _, arguments = rest.partition("(")
            operands = re.findall(r"%([\w.\-]+)", arguments[: _closing(arguments)])
            body.append(_Instruction(found[2], shape, opcode, operands, line, bool(found[1])))
    if not entry:
        raise ValueError("this is not the text of a compiled program")
    return computations, entry


def _split_shape(text: str) -> tuple[str, str]:
    """`f32[2]{0} add(...)` or `(f32[2], s32[]) tuple(...)` -> shape, rest."""
    end = _closing(text[1:]) + 2 if text.startswith("(") else text.index(" ")
    return text[:end], text[end:].lstrip()


def _closing(text: str) -> int:
    """Where the parenthesis that was opened before `text` closes."""
    depth = 1
    for found in re.finditer(r"[()]", text):
        depth += 1 if found[0] == "(" else -1
        if not depth:
            return found.start()
    return len(text)


def _walk(
    computations: dict[str, list[_Instruction]], name: str, times: int, program: Program, inside_fusion: bool = False
) -> Iterator[tuple[list[_Instruction], int, bool]]:
    """(computation, how often it runs, whether in a fusion) for `name` and all that it calls, loops by their trips."""
    computation = computations[name]
    yield computation, times, inside_fusion
    for i in computation:
        if i.opcode == "while":
            trips = _trip_count(i, computation, computations)
            program.open_loops += trips is None
            body = re.search(r"\bbody=%?([\w.\-]+)", i.text)
            if body:
                yield from _walk(computations, body[1], times * (1 if trips is None else trips), program, inside_fusion)
        elif _collective(i) is None or i.opcode == "fusion":
            for called in _called(i):
                if called in computations and not called.startswith(_REDUCE_SCATTER):
                    fused = inside_fusion or i.opcode == "fusion"
                    yield from _walk(computations, called, times, program, fused)


def _called(i: _Instruction) -> list[str]:
    names = []
    for found in _CALLED.finditer(i.text):
        rest = i.text[found.end() :]
        listed = rest[1 : rest.index("}")] if rest.startswith("{") else re.match(r"%?[\w.\-]+", rest)[0]
        names += [name.strip().lstrip("%") for name in listed.split(",")]
    return names


def _collective(i: _Instruction) -> str | None:
    """The kind of collective that this instruction finishes, if it does."""
    if i.opcode == "fusion" and any(name.startswith(_REDUCE_SCATTER) for name in _called(i)):
        return "reduce-scatter"
    kind = i.opcode.removesuffix("-done")
    return kind if kind in COLLECTIVES else None


def _trip_count(loop: _Instruction, around: list[_Instruction], computations) -> int | None:
    """How often a loop runs; None if that depends on data."""
    if known := re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.text):
        return int(known[1])
    parts = {part: re.search(rf"\b{part}=%?([\w.\-]+)", loop.text) for part in ("condition", "body")}
    condition = {i.name: i for i in computations[parts["condition"][1]]}
    body = {i.name: i for i in computations[parts["body"][1]]}
    before = {i.name: i for i in around}
    start = before[loop.operands[0]]
    test = next(i for i in condition.values() if i.is_root)
    if test.opcode != "compare" or "direction=LT" not in test.text:
        return None
    counter, limit = (condition[name] for name in test.operands)
    if counter.opcode != "get-tuple-element" or start.opcode != "tuple":
        return None
    place = _index(counter)

    def value(i: _Instruction) -> int | None:
        """Of a constant, also one that is carried through the loop."""
        if i.opcode == "get-tuple-element" and i.operands[0] in condition:
            i = before[start.operands[_index(i)]]
        while i.opcode in ("copy", "bitcast") and i.operands[0] in before:
            i = before[i.operands[0]]
        found = re.search(r"constant\((\d+)\)", i.text)
        return int(found[1]) if found else None

    first, last = value(before[start.operands[place]]), value(limit)
    stepped = body[next(i for i in body.values() if i.is_root).operands[place]]
    steps = [body[name] for name in stepped.operands if body[name].opcode == "constant"]
    if first is None or last is None or stepped.opcode != "add" or len(steps) != 1:
        return None
    return max(0, math.ceil((last - first) / (value(steps[0]) or 1)))


def _index(i: _Instruction) -> int:
    return int(re.search(r"\bindex=(\d+)", i.text)[1])


def _bytes(shape: str) -> int:
    """Of all arrays in a shape; padding of layouts is not counted."""
    total = 0
    for kind, dimensions in _ARRAY.findall(shape):
        bits = _BITS.get(kind) or (8 if kind.startswith("f8") else int(kind[1:]))
        total += math.prod(int(size) for size in dimensions.split(",") if size) * bits // 8
    return total


def _sizes(shape: str) -> list[int]:
    found = _ARRAY.search(shape)
    return [int(size) for size in found[2].split(",") if size] if found else []


def _product_flop(i: _Instruction, shapes: dict[str, str]) -> int:
    """Two for each multiplication of a matrix product, or of the convolution that a TPU makes of it."""
    out = math.prod(_sizes(i.shape))
    if i.opcode == "dot":
        left = _sizes(shapes[i.operands[0]])
        contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", i.text)[1]
        return 2 * out * math.prod(left[int(axis)] for axis in contracted.split(",") if axis)
    kernel = _sizes(shapes[i.operands[1]])
    labels = re.search(r"dim_labels=\w+_(\w+)->", i.text)[1]
    return 2 * out * math.prod(kernel) // kernel[labels.index("o")]


def _origin(text: str) -> str:
    found = re.search(r'op_name="([^"]*)"', text)
    return found[1].removeprefix("jit(step)/") if found else ""
