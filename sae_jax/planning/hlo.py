"""Work and communication of a step, read from the text of its compiled program.

The program is followed from its entry, and each computation counts as often as it runs: the body of a loop once a trip.
One branch of a conditional runs: the one with the most work in the busiest step, with the least in the quietest. Traps:

- GPU programs carry a loop's trip count; in TPU programs it is the constant that the loop's condition compares with.
  The length of a loop that depends on data is in neither: its body counts once, and `open_loops` says so.
- An asynchronous collective is two instructions, start and done. It counts where it is done.
- A TPU's `all-reduce-scatter` is a fusion around an all-reduce that moves what a reduce-scatter moves, and is one.
- Operands are names; their shapes stand where they are made.
- What one instruction applies to each number, such as the sum of a reduction, is part of it, as what it fuses is.
- A TPU makes a batched product a convolution whose batch axes are spatial, as wide as they are and dilated as much; so
  are axes of the right side alone, along which the left side is one number among zeros.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")

_BITS = {"pred": 8, "bf16": 16, "c64": 64, "c128": 128}  # other types end in their number of bits
_ARRAY = re.compile(r"\b(pred|bf16|f8\w*|[sufc]\d+)\[([\d,]*)\]")
_HEAD = re.compile(r"^(ENTRY )?%?([\w.\-]+) (?:\(.*)?\{$")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%([\w.\-]+) = (.*)$")
_CALLS = "calls|to_apply|branch_computations|called_computations|true_computation|false_computation"
_ELEMENTWISE = {
    *(
        "add",
        "subtract",
        "multiply",
        "divide",
        "remainder",
        "power",
        "maximum",
        "minimum",
        "clamp",
        "select",
        "compare",
    ),
    *("negate", "abs", "sign", "floor", "ceil", "sqrt", "rsqrt", "exponential", "exponential-minus-one", "log"),
    *("log-plus-one", "logistic", "tanh", "erf", "sine", "cosine", "and", "or", "not"),
}
_NO_BUFFER = ("parameter", "get-tuple-element", "tuple", "bitcast", "constant", "while", "conditional", "call")
_NO_KERNEL = (*_NO_BUFFER, "after-all", "partition-id", "replica-id", "opt-barrier", "add-dependency", "domain")


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


class Moved(NamedTuple):
    """What a kernel reads of an array, or writes of it."""

    elements: int  # of the array
    bytes: int  # that are read or written
    is_whole: bool  # all of it, as by a pass over it; else rows, or slices


@dataclass
class Kernel:
    """What a device is told to do at once: an instruction outside of fusions."""

    origin: str  # the operation in the source that asked for it
    kind: str  # of instruction; a sort is one, though a GPU takes several steps for it
    times: int  # that it runs
    flop: dict[str, int]  # of products, by the type of their factors, each time
    moved: list[Moved]  # each time

    @property
    def bytes(self) -> int:
        """Read and written each time."""
        return sum(moved.bytes for moved in self.moved)


@dataclass
class Program:
    """What one device does in one run of the program."""

    collectives: dict[str, Collective] = field(default_factory=dict)
    matmul_flop: int = 0  # of products; element-wise work and sums are left out
    other_flop: int = 0  # of these, one for each number; an exponential counts as an addition does
    kernels: list[Kernel] = field(default_factory=list)
    sorts: int = 0  # instructions, however often they run
    open_loops: int = 0  # loops whose length depends on data; their bodies count once
    largest: list[Buffer] = field(default_factory=list)

    @property
    def moved_bytes(self) -> int:
        """Read and written by kernels, as if nothing stayed in a cache between two of them."""
        return sum(kernel.times * kernel.bytes for kernel in self.kernels)


@dataclass
class _Instruction:
    name: str
    shape: str  # of the result
    opcode: str
    operands: list[str]
    text: str  # all of it
    is_root: bool

    def attribute(self, name: str) -> str:
        """The value of `name=value` or `name={values}`; empty if there is none."""
        found = re.search(rf"\b(?:{name})=(?:\{{([^}}]*)\}}|%?([\w.\-]+))", self.text)
        return (found[1] if found[1] is not None else found[2]) if found else ""

    @property
    def called(self) -> list[str]:
        """Computations that it calls, but for the parts of a loop. A conditional has one attribute of all or two."""
        listed = re.finditer(rf"\b(?:{_CALLS})=(?:\{{([^}}]*)\}}|%?([\w.\-]+))", self.text)
        return [name for found in listed for name in re.findall(r"[\w.\-]+", found[1] or found[2] or "")]


_Computations = dict[str, list[_Instruction]]


def analyse(text: str, quietest: bool = False, n_largest: int = 5) -> Program:
    """The program that `compiled.as_text()` prints.

    Args:
        text: of one device's program.
        quietest: take the branches with the least work, else those with the most.
        n_largest: how many buffers to name.

    Raises:
        ValueError: it is the text of something else.
    """
    computations, entry = _parse(text)
    program = Program()
    buffers: dict[str, Buffer] = {}
    for computation, times, in_fusion in _walk(computations, entry, min if quietest else max):
        program.matmul_flop += times * sum(flop for _, flop in _products(computation))
        program.other_flop += times * _other_flop(computation)
        made = {i.name: i for i in computation}
        for i in computation:
            if not in_fusion and times and _is_kernel(i):
                flop = _flop_of_kernel(i, made, computations)
                program.kernels.append(Kernel(_origin(i), i.opcode, times, flop, _moved(i, made, computations)))
            if kind := _collective(i):
                begun = made[i.operands[0]] if i.opcode.endswith("-done") else i
                taken = sum(_bytes(made[name].shape) for name in begun.operands)
                collective = program.collectives.setdefault(kind, Collective(kind))
                collective.count += times
                collective.bytes += times * max(taken, _bytes(i.shape))
            elif i.opcode == "sort" or "RadixSort" in i.attribute("custom_call_target"):
                program.sorts += 1
            elif i.opcode == "while":
                program.open_loops += _trip_count(i, made, computations) is None
            if not in_fusion and i.opcode not in _NO_BUFFER and not i.opcode.endswith("-start"):
                for shape in _ARRAY.finditer(i.shape):
                    buffers.setdefault(shape[0], Buffer(shape[0], _bytes(shape[0]), _origin(i)))
    program.largest = sorted(buffers.values(), key=lambda buffer: -buffer.bytes)[:n_largest]
    return program


def _parse(text: str) -> tuple[_Computations, str]:
    """Computations by name, and the name of the first to run."""
    computations: _Computations = {}
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
    computations: _Computations, name: str, choose: Callable[..., str], times: int = 1, in_fusion: bool = False
) -> Iterator[tuple[list[_Instruction], int, bool]]:
    """(computation, how often it runs, whether it is in a fusion) for `name` and all that it calls."""

    def work(branch: str) -> tuple[int, int]:
        parts = list(_walk(computations, branch, choose))
        flop = sum(times * flop for computation, times, _ in parts for _, flop in _products(computation))
        return flop, sum(times * len(computation) for computation, times, _ in parts)

    computation = computations[name]
    yield computation, times, in_fusion
    made = {i.name: i for i in computation}
    for i in computation:
        if i.opcode == "while":
            trips = _trip_count(i, made, computations)
            more = times * (1 if trips is None else trips)
            yield from _walk(computations, i.attribute("body"), choose, more, in_fusion)
        elif i.opcode == "conditional":
            yield from _walk(computations, choose(i.called, key=work), choose, times, in_fusion)
        elif not _collective(i):
            for called in i.called:
                yield from _walk(computations, called, choose, times, in_fusion or i.opcode != "call")


def _collective(i: _Instruction) -> str | None:
    """The kind of collective that this instruction finishes, if it does."""
    if i.opcode == "fusion" and i.attribute("calls").startswith("all-reduce-scatter"):
        return "reduce-scatter"
    kind = i.opcode.removesuffix("-done")
    return kind if kind in COLLECTIVES else None


def _trip_count(loop: _Instruction, around: dict[str, _Instruction], computations: _Computations) -> int | None:
    """How often a loop runs; None if that depends on data."""
    if known := re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.text):
        return int(known[1])
    condition = {i.name: i for i in computations[loop.attribute("condition")]}
    body = {i.name: i for i in computations[loop.attribute("body")]}
    test, result = (next(i for i in part.values() if i.is_root) for part in (condition, body))
    carried = around[loop.operands[0]].operands

    def constant(i: _Instruction) -> int | None:
        """Its value, also where it is carried into the loop."""
        if i.opcode == "get-tuple-element" and i.name in condition:
            i = around[carried[int(i.attribute("index"))]]
        while i.opcode in ("copy", "bitcast") and i.name in around:
            i = around[i.operands[0]]
        found = re.search(r"constant\((-?\d+)\)", i.text)
        return int(found[1]) if found else None

    if test.opcode != "compare" or test.attribute("direction") != "LT":
        return None
    counter, limit = (condition[name] for name in test.operands)
    if counter.opcode != "get-tuple-element" or not carried:
        return None
    stepped = body[result.operands[int(counter.attribute("index"))]]
    steps = [value for name in stepped.operands if (value := constant(body[name])) is not None]
    first, last = constant(counter), constant(limit)
    if stepped.opcode != "add" or len(steps) != 1 or first is None or last is None:
        return None
    return max(0, math.ceil((last - first) / steps[0]))


def _bytes(shape: str) -> int:
    """Of all arrays in a shape; padding of layouts is not counted."""
    total = 0
    for kind, sizes in _ARRAY.findall(shape):
        bits = _BITS.get(kind) or (8 if kind.startswith("f8") else int(kind[1:]))
        total += math.prod(_numbers(sizes)) * bits // 8
    return total


def _numbers(listed: str) -> list[int]:
    return [int(number) for number in listed.split(",") if number]


def _products(
    computation: list[_Instruction], made: dict[str, _Instruction] | None = None
) -> Iterator[tuple[str, int]]:
    """(type of the left factor, FLOP) of each matrix product, or of the convolution that a TPU makes of it.

    Two for each multiplication. `made`: where the factors stand, if not among these instructions.
    """
    made = made or {i.name: i for i in computation}
    for i in computation:
        if i.opcode not in ("dot", "convolution"):
            continue
        found = [_ARRAY.findall(shape)[0] for shape in (*(made[name].shape for name in i.operands), i.shape)]
        kind, (left, right, out) = found[0][0], [_numbers(sizes) for _, sizes in found]
        if i.opcode == "dot":
            yield kind, 2 * math.prod(out) * math.prod(left[a] for a in _numbers(i.attribute("lhs_contracting_dims")))
        else:
            yield kind, _convolution_flop(i, left, right, out)


def _convolution_flop(i: _Instruction, left: list[int], right: list[int], out: list[int]) -> int:
    """Two for each pair of numbers that meet: zeros between and around those of the left side are no work."""
    of_left, of_right, of_out = re.split("_|->", i.text.partition("dim_labels=")[2].partition(",")[0])
    flop = 2 * out[of_out.index("b")] * out[of_out.index("f")] * right[of_right.index("i")]
    window = i.attribute("window")
    for axis in range(len(of_left) - 2):  # spatial ones are digits
        size, stride, dilation = (int(_along(window, name, axis, "1")) for name in ("size", "stride", "lhs_dilate"))
        pad = int(_along(window, "pad", axis, "0_0").partition("_")[0])
        n, pairs = left[of_left.index(str(axis))], 0
        for first in range(-pad, stride * out[of_out.index(str(axis))] - pad, stride):
            last = min((first + size - 1) // dilation, n - 1)
            pairs += max(last - max(-(-first // dilation), 0) + 1, 0)
        flop *= pairs
    return flop


def _along(window: str, name: str, axis: int, default: str) -> str:
    """What a convolution's window says of one axis."""
    values = re.search(rf"\b{name}=([-\dx_]+)", window)
    return values[1].split("x")[axis] if values else default


def _is_kernel(i: _Instruction) -> bool:
    # An asynchronous one is two instructions: of a fusion the first says what is done, of others the second.
    return (
        i.opcode not in _NO_KERNEL and (not i.opcode.endswith("-start") or _is_fusion(i)) and i.opcode != "fusion-done"
    )


def _is_fusion(i: _Instruction) -> bool:
    return i.opcode in ("fusion", "fusion-start")


def _flop_of_kernel(i: _Instruction, made: dict[str, _Instruction], computations: _Computations) -> dict[str, int]:
    """FLOP of products, by the type of their factors."""
    products = [*_products([i], made)]
    for name in i.called:
        products += [each for inside, *_ in _walk(computations, name, max) for each in _products(inside)]
    return {kind: sum(n for each, n in products if each == kind) for kind, _ in products}


def _moved(i: _Instruction, made: dict[str, _Instruction], computations: _Computations) -> list[Moved]:
    """What one run of a kernel reads and writes: each operand once, and its results.

    Of an array from which rows are taken only those count, of one that is changed in place what is changed.
    """
    if not _is_fusion(i):
        begun = made[i.operands[0]] if i.opcode.endswith("-done") else i
        moved = [_taken(made[name], [begun]) for name in dict.fromkeys(begun.operands)]
        return [each for each in (*moved, _written(i, made)) if each.bytes]
    inside = computations[i.attribute("calls")]
    names = {j.name: j for j in inside}
    root = next(j for j in inside if j.is_root)
    results = [names[name] for name in root.operands] if root.opcode == "tuple" else [root]
    moved = [_written(_behind_bitcasts(result, names), names) for result in results]
    return [each for each in (*moved, *(_taken(j, inside) for j in inside if j.opcode == "parameter")) if each.bytes]


def _elements(shape: str) -> int:
    """Of all arrays in a shape."""
    return sum(math.prod(_numbers(sizes)) for _, sizes in _ARRAY.findall(shape))


def _taken(array: _Instruction, users: list[_Instruction]) -> Moved:
    """What instructions read of an array, together: at most all of it."""
    n_bytes, size, names = 0, _bytes(array.shape), {array.name}
    made = {i.name: i for i in users}
    for i in users:
        if not names.intersection(i.operands):
            continue
        if i.opcode == "bitcast":
            names.add(i.name)
        elif i.opcode in ("slice", "dynamic-slice", "gather") and i.operands[0] in names:
            n_bytes += _bytes(i.shape)
        elif i.opcode in ("dynamic-update-slice", "scatter") and i.operands[0] in names:
            update = made.get(i.operands[1 if i.opcode == "dynamic-update-slice" else 2])
            n_bytes += _bytes(update.shape) if update and i.opcode == "scatter" else 0
        else:
            return Moved(_elements(array.shape), size, True)
    return Moved(_elements(array.shape), min(n_bytes, size), False)


def _written(i: _Instruction, made: dict[str, _Instruction]) -> Moved:
    """Of a result, what is new: the update of one that is changed in place."""
    update = {"dynamic-update-slice": 1, "scatter": 2}.get(i.opcode)
    if update is None or (i.opcode == "scatter" and len(i.operands) != 3):
        return Moved(_elements(i.shape), _bytes(i.shape), True)
    return Moved(_elements(i.shape), _bytes(made[i.operands[update]].shape), False)


def _behind_bitcasts(i: _Instruction, made: dict[str, _Instruction]) -> _Instruction:
    while i.opcode == "bitcast":
        i = made[i.operands[0]]
    return i


def _other_flop(computation: list[_Instruction]) -> int:
    """One for each number that an element-wise operation makes, or that a sum takes in."""
    shapes = {i.name: i.shape for i in computation}
    flop = 0
    for i in computation:
        if i.opcode in _ELEMENTWISE:
            flop += math.prod(_numbers(_ARRAY.findall(i.shape)[0][1]))
        elif i.opcode == "reduce":  # takes as many start values as arrays
            for name in i.operands[: len(i.operands) // 2]:
                flop += math.prod(_numbers(_ARRAY.findall(shapes[name])[0][1]))
    return flop


def _origin(i: _Instruction) -> str:
    found = re.search(r'op_name="([^"]*)"', i.text)
    return found[1].removeprefix("jit(step)/") if found else ""
