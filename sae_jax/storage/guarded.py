"""Reading files that may be damaged or hostile: JSON, YAML, arrays of numpy and the headers of safetensors files.

Whatever is wrong with a file is one UserError that names it. Only regular files are opened, so that a pipe or a device
cannot block; a file is not read before its size has been compared with a limit; JSON is strict (UTF-8, no NaN, no
number beyond float64), neither deep nor ambiguous; and values get their types from the caller.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import stat
import sys
import warnings
import zipfile
from collections import Counter
from collections.abc import Hashable, Iterator
from io import FileIO
from typing import Any, TypeVar

import msgspec
import numpy as np
import yaml

from sae_jax.errors import UsageError, UserError
from sae_jax.storage.disk import StrPath

T = TypeVar("T")

MAX_BYTES = 256 << 20  # of JSON; the largest we know are tokenizers, of some 30 MiB
MAX_DEPTH = 64  # of nested lists and objects
MAX_YAML_CHARACTERS = 1 << 17  # a second or so of PyYAML
MAX_YAML_VALUES = 100_000  # an alias counts each time it is used
MAX_YAML_INTEGER = 1 << 64

_LONG_NUMBER = re.compile(rb"\d{309}")  # 10^308 is the largest float

DAMAGED = "it is damaged: restore it, or delete it and make it again"


def open_file(path: StrPath) -> FileIO:
    """A regular file, opened for reading. Raises UserError for anything else, FileNotFoundError if there is none."""
    try:
        # Without O_NONBLOCK, opening a pipe would wait for somebody to write to it.
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    except ValueError as error:  # a zero byte, or half of a surrogate pair
        raise UserError(f"{path}: no name of a file ({error})") from None
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise UserError(f"{path}: not a regular file; give the path of one")
    return FileIO(descriptor, "rb")


def read_limited(path: StrPath, limit: int = MAX_BYTES) -> bytes:
    """The content of a regular file on a disk. Raises UserError if it is longer than `limit` bytes."""
    with open_file(path) as file:
        size = os.fstat(file.fileno()).st_size
        refuse_long(path, size, limit)
        data = file.read(size) or b""  # for so many bytes memory is taken, however few come
        while len(data) < size and (more := file.read(size - len(data))):
            data += more
    return data


def refuse_long(path: StrPath, size: int, limit: int) -> None:
    """Raise UserError if so many bytes are more than such a file can have."""
    if size > limit:
        raise UserError(f"{path}: {size:,} bytes, more than the {limit:,} that such a file can have; restore it")


def parse_json(data: bytes, where: object, kind: Any = Any) -> Any:
    """The value of JSON text as a `kind`, without silent casts.

    Raises UserError, naming `where`, if the text is not JSON or the value is of another type.
    """
    try:
        value = msgspec.json.decode(data)
    except (msgspec.MsgspecError, RecursionError, UnicodeError) as error:
        raise UserError(f"{where}: not valid JSON ({one_line(error)}); {DAMAGED}") from None
    _refuse_deep(value, where)
    if _LONG_NUMBER.search(data):
        _refuse_huge(value, where)
    return value if kind is Any else as_type(value, kind, where)


def as_type(value: Any, kind: type[T], where: object) -> T:
    """A value of parsed JSON as a `kind`, without silent casts. Raises UserError, naming `where`."""
    try:
        return msgspec.convert(value, kind, strict=True)
    except (msgspec.ValidationError, UserError) as error:  # a dataclass may refuse its values itself
        raise UserError(f"{where}: {error}; {DAMAGED}") from None


def parse_yaml(text: str, where: object) -> Any:
    """The value of YAML text, which must not repeat a key. Raises UsageError, naming `where`, if it is not valid."""
    if len(text) > MAX_YAML_CHARACTERS:
        raise UsageError(f"{where}: {len(text):,} characters; a recipe has at most {MAX_YAML_CHARACTERS:,}")
    loader = None
    try:
        loader = _UniqueKeys(text)
        node = loader.get_single_node()
        if node is None:
            return None
        if _n_values(node, {}) > MAX_YAML_VALUES:
            raise UsageError(f"{where}: its aliases (*name) stand for over {MAX_YAML_VALUES:,} values; write fewer")
        return loader.construct_document(node)
    except RecursionError:
        raise UsageError(f"{where}: nested too deep, or an alias (*name) stands inside what it repeats") from None
    except (yaml.YAMLError, ValueError, TypeError, LookupError, AttributeError, ArithmeticError) as error:
        # Not only YAMLError: of a date that does not exist, for one, or of an empty !!int.
        raise UsageError(f"{where}: not valid YAML: {' '.join(str(error).split()) or type(error).__name__}") from None
    finally:
        if loader is not None:
            loader.dispose()


@contextlib.contextmanager
def open_safetensors(path: StrPath) -> Iterator[Any]:
    """A safetensors file, opened by its own library, which compares all sizes with the file's before it reads.

    Its errors within the block, too, are UserErrors that name the file.
    """
    from safetensors import SafetensorError, safe_open

    try:
        open_file(path).close()
        with safe_open(path, framework="numpy") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: cannot be read ({one_line(error)}); restore the file, or write it again") from None


def parse_npz(data: bytes, where: object) -> dict[str, np.ndarray]:
    """The arrays in the bytes of a file that `numpy.savez` wrote: numbers and text, not packed.

    They are views of `data`, so no array is larger than the file. Raises UserError, naming `where`, for anything else.
    """
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as file:
            if any(part.compress_type != zipfile.ZIP_STORED for part in file.infolist()):
                raise ValueError("its arrays are packed")
            return {name.removesuffix(".npy"): _array(file.read(name)) for name in file.namelist()}
    except Exception as error:  # zipfile and numpy raise whatever the layers below them do
        raise UserError(f"{where}: not arrays of numpy ({one_line(error)}); {DAMAGED}") from None


def _array(data: bytes) -> np.ndarray:
    """The array in the bytes of a .npy file."""
    file = io.BytesIO(data)
    shape, in_columns, dtype = npy_header(file)
    if dtype.kind not in "biufU":
        raise ValueError(f"{dtype}{list(shape)}")
    array = np.frombuffer(data, dtype, offset=file.tell())
    return array.reshape(shape, order="F" if in_columns else "C")


def npy_header(file: io.BytesIO) -> tuple[tuple[int, ...], bool, np.dtype]:
    """(shape, whether columns follow each other, dtype) of the array whose .npy file begins here; reads to its bytes.

    Raises ValueError, or whatever numpy does, for another version or a negative size.
    """
    if np.lib.format.read_magic(file) != (1, 0):
        raise ValueError("of another version")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SyntaxWarning)  # numpy reads the header as Python
        shape, in_columns, dtype = np.lib.format.read_array_header_1_0(file)
    if min(shape, default=0) < 0:
        raise ValueError(f"{dtype}{list(shape)}")
    return shape, in_columns, dtype


def one_line(error: BaseException) -> str:
    """The first line of what an error says, or its name."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


class _UniqueKeys(yaml.SafeLoader):
    """PyYAML keeps the last of two equal keys without a word; a recipe that says two things is refused instead.

    So is a number that is another one than it looks like.
    """

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        if isinstance(node, yaml.MappingNode):
            keys = [self.construct_object(key, deep=True) for key, _ in node.value]
            counts = Counter(key for key in keys if isinstance(key, Hashable))
            for key, count in counts.items():
                if count > 1:
                    raise yaml.constructor.ConstructorError(None, None, f"key {key!r} stands twice", node.start_mark)
        return super().construct_mapping(node, deep)

    def construct_scalar(self, node: yaml.ScalarNode | yaml.MappingNode) -> Any:
        value = super().construct_scalar(node)
        if isinstance(value, str) and re.search("[\ud800-\udfff]", value):
            raise yaml.constructor.ConstructorError(None, None, "half of a surrogate pair", node.start_mark)
        return value

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        if re.fullmatch(r"[-+]?(0[0-9_]+|.*:.*)", str(node.value)):  # 010 would be 8, and 1:30 ninety
            what = f"{node.value} is another number in YAML; write it in decimal, or as text in quotes"
            raise yaml.constructor.ConstructorError(None, None, what, node.start_mark)
        value = super().construct_yaml_int(node)
        if abs(value) >= MAX_YAML_INTEGER:  # Python does not even print the longest
            raise yaml.constructor.ConstructorError(None, None, "a whole number of 2^64 or more", node.start_mark)
        return value


_UniqueKeys.add_constructor("tag:yaml.org,2002:int", _UniqueKeys.construct_yaml_int)


def _n_values(node: yaml.Node, known: dict[int, int]) -> int:
    """How many values a node stands for when its aliases are written out."""
    if id(node) not in known:
        children = node.value if isinstance(node, yaml.CollectionNode) else ()
        flat = (part for child in children for part in (child if isinstance(child, tuple) else (child,)))
        known[id(node)] = 1 + sum(_n_values(part, known) for part in flat)
    return known[id(node)]


def _refuse_deep(value: Any, where: object) -> None:
    """Deep values end in a RecursionError wherever they are walked."""
    level = [value] if isinstance(value, dict | list) else []
    for _ in range(MAX_DEPTH):
        values = (parent.values() if isinstance(parent, dict) else parent for parent in level)
        level = [child for children in values for child in children if isinstance(child, dict | list)]
        if not level:
            return
    raise UserError(f"{where}: nested more than {MAX_DEPTH} deep; {DAMAGED}")


def _refuse_huge(value: Any, where: object) -> None:
    """A whole number beyond float64 ends in an OverflowError wherever one computes with it."""
    if isinstance(value, int) and abs(value) > sys.float_info.max:
        raise UserError(f"{where}: has a whole number of {len(str(abs(value)))} digits; {DAMAGED}")
    for child in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        _refuse_huge(child, where)
