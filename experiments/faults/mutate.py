"""Damage to the bytes of a file: anywhere, or in the values that its format holds, so that it stays well formed."""

from __future__ import annotations

import io
import json
import random
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

ODD: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 2, 7, 255, 2**31 - 1, 2**31, 2**53, 2**63, 2**64, -(2**63), 10**18, 10**30, 10**400),
    *(0.5, -0.0, 1.0, 1e-320, 1e308, -1e308, float("nan"), float("inf"), float("-inf")),
    *(
        "",
        " ",
        "x",
        "0",
        "1e3",
        "\0",
        "\n",
        "a\nb",
        "\r",
        "\x1b[31m",
        "\u2028",
        "\ud800",
        "\udc80",
        "\U0001d54f",
        "[x]",
    ),
    *("../x", "/dev/zero", "/", ".", "~", "%s{0}", "x" * 5000, "nan", "Infinity", "F64", "BF16", "true", "null"),
    *([], {}, [[]], [{}], {"": 1}, {"a": {"b": 1}}, [None], [0] * 5000, ["x"] * 3, {"__class__": 1}, [1, "x", None]),
)
TOKENS = (
    *(
        b"\0",
        b"\xff",
        b"\xef\xbb\xbf",
        b"\xff\xfe",
        b"\n",
        b"\r\n",
        b"\t",
        b'"',
        b"\\",
        b"\\u0000",
        b"\\ud800",
        b"{",
        b"}",
    ),
    *(b"[", b"]", b":", b",", b"null", b"NaN", b"-", b"1e999", b"9" * 400, b"[" * 300, b'{"a":' * 300, b"x" * 70_000),
    *(b"\xf0\x90", b"\xc3\x28", b"\x1b[2J", b"\xe2\x80\xa8", b"\x7f" * 8, b"\xff" * 8, b"\0" * 8, b"PK\x03\x04"),
)
YAML_TOKENS = (
    *("&a [*a]", "*a", "!!python/object:os.system x", "!!int ''", "!!float x", "!!timestamp x", "!!binary x", "!x y"),
    *("? [a]\n: b", "<<: {a: 1}", "<<: 5", "2001-13-41", "2001-01-01", "1:2:3", "0o7", "0x_", "[" * 500, "- " * 500),
    *(
        "{a: 1, a: 2}",
        "|\n  x",
        ">-",
        "%YAML 9.9\n---\n",
        "---\n",
        "...\n",
        "\t",
        "@",
        "`",
        "'",
        '"\\x"',
        "~",
        "{",
        ".inf",
    ),
    *("--sae.k=2", "- -", "=", "yes", "1_000", "+1", "1e400", "-.nan", "''", "x: y: z", "#", "\u0085"),
)


def mutated(name: str, data: bytes, rng: random.Random) -> bytes:
    """Other content for a file of this name: one to three changes, most of them in its values where it has some."""
    how = _by_values(name)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        try:
            data = how(data, rng) if how and rng.random() < 0.7 else in_bytes(data, rng)
        except Exception:  # an earlier change has taken its form away
            data = in_bytes(data, rng)
    return data


def _by_values(name: str) -> Callable[[bytes, random.Random], bytes] | None:
    suffix = Path(name).suffix
    if name.startswith(("_", "manifest")) or suffix in (".json", ".owner"):
        return in_json
    ways = {".jsonl": in_lines, ".yaml": in_yaml, ".safetensors": in_safetensors, ".npy": in_npy, ".npz": in_npz}
    return ways.get(suffix)


def in_bytes(data: bytes, rng: random.Random) -> bytes:
    """Bits flipped, a piece cut, repeated, moved, replaced or put in, numbers changed."""
    at, to = sorted(rng.randrange(len(data) + 1) for _ in range(2))
    near = min(at + rng.choice((1, 1, 2, 4, 8, 16)), len(data))
    ways: list[Callable[[], bytes]] = [
        lambda: bytes([*data[:at], data[at] ^ 1 << rng.randrange(8), *data[at + 1 :]]) if at < len(data) else data[:at],
        lambda: data[:at],
        lambda: data[:at] + data[near:],
        lambda: data[:at] + data[to:],
        lambda: data[:at] + data[at:to] * rng.choice((2, 3, 50)) + data[to:] if to - at < 4096 else data[at:],
        lambda: data[:at] + rng.choice(TOKENS) + data[near:],
        lambda: data[:at] + rng.choice(TOKENS) + data[at:],
        lambda: data[:at] + rng.randbytes(near - at) + data[near:],
        lambda: data[to:] + data[at:to] + data[:at],
        lambda: data[:at] + struct.pack("<q", rng.choice((0, -1, 1, 2**31, 2**62, len(data)))) + data[at + 8 :],
        lambda: b"",
    ]
    return rng.choices(ways, (6, 2, 4, 2, 2, 4, 4, 3, 1, 2, 0.2))[0]()


def in_json(data: bytes, rng: random.Random) -> bytes:
    """Values, keys and forms of a JSON text."""
    value = in_value(json.loads(data), rng)
    text = json.dumps(value, ensure_ascii=rng.random() < 0.8)
    if rng.random() < 0.05 and isinstance(value, dict) and value:
        key = rng.choice(list(value))
        text = f"{text[:-1]}, {json.dumps(key)}: {json.dumps(rng.choice(ODD))}}}"
    return text.encode(errors="surrogatepass")


def in_value(value: Any, rng: random.Random) -> Any:
    """A nested value with another value, key or form at one place, any place as likely as any other."""
    places: list[tuple[Any, Any]] = [(None, None)]
    for parent, key in places:
        child = value if parent is None else parent[key]
        if isinstance(child, dict | list) and len(places) < 20_000:
            places += [(child, at) for at in (child if isinstance(child, dict) else range(len(child)))]
    parent, key = rng.choice(places)
    if parent is None and rng.random() < 0.9 and len(places) > 1:
        parent, key = rng.choice(places[1:])
    if parent is None:
        return _other(value, rng)
    way = rng.random()
    if way < 0.15:
        del parent[key]
    elif way < 0.25 and isinstance(parent, dict):
        parent[rng.choice(("x", "", "\ud800", "a.b", "--x", "y" * 300, key + "_", "\n"))] = rng.choice(ODD)
    elif way < 0.3 and isinstance(parent, dict):
        parent[key + rng.choice((" ", "_", "\0", "é"))] = parent.pop(key)
    elif way < 0.3 and isinstance(parent, list):
        parent.insert(rng.randrange(len(parent) + 1), parent[key])
    elif way < 0.4:
        other, at = rng.choice(places[1:])
        parent[key] = json.loads(json.dumps(other[at])) if at in other or isinstance(at, int) else None
    else:
        parent[key] = _other(parent[key], rng)
    return value


def _other(value: Any, rng: random.Random) -> Any:
    near: list[Any] = []
    if isinstance(value, bool | int | float) and abs(value) < 1e300:
        near = [value + 1, value - 1, -value, value * 2, value * 10**6, float(value), str(value), [value], bool(value)]
    elif isinstance(value, str):
        near = [
            value * 2,
            value[:-1],
            value + rng.choice("x\0\n/. 9-"),
            value.upper(),
            [value],
            {value: value},
            value[1:],
        ]
    elif isinstance(value, list):
        near = [
            value[:-1],
            value * 2,
            value[::-1],
            [*value, rng.choice(ODD)],
            dict(enumerate(map(str, value[:9]))),
            [value],
        ]
    elif isinstance(value, dict):
        near = [list(value), list(value.values()), [value], {"x": value}]
    if rng.random() < 0.02:
        deep: Any = value
        for _ in range(rng.choice((60, 70, 500))):
            deep = [deep] if rng.random() < 0.5 else {"a": deep}
        return deep
    return rng.choice(near) if near and rng.random() < 0.5 else rng.choice(ODD)


def in_lines(data: bytes, rng: random.Random) -> bytes:
    """One of the JSON texts, a line each."""
    lines = data.split(b"\n")
    at = rng.randrange(len(lines))
    lines[at] = in_json(lines[at], rng)
    return b"\n".join(lines)


def in_yaml(data: bytes, rng: random.Random) -> bytes:
    """Values of a YAML text, or a piece of syntax in the middle of it."""
    if rng.random() < 0.5:
        value = in_value(yaml.safe_load(data), rng)
        return yaml.safe_dump(value, allow_unicode=rng.random() < 0.5).encode(errors="surrogatepass")
    lines = data.decode().split("\n")
    at = rng.randrange(len(lines))
    key, colon, _ = lines[at].partition(":")
    lines[at] = f"{key}{colon} {rng.choice(YAML_TOKENS)}" if rng.random() < 0.7 else rng.choice(YAML_TOKENS) + lines[at]
    return "\n".join(lines).encode()


def in_safetensors(data: bytes, rng: random.Random) -> bytes:
    """The header (names, dtypes, shapes, offsets), or what it says of its length."""
    n = int.from_bytes(data[:8], "little")
    if rng.random() < 0.1:
        return struct.pack("<Q", rng.choice((0, 1, n - 1, n + 1, len(data), 2**32, 2**63, 2**64 - 1))) + data[8:]
    header = json.dumps(in_value(json.loads(data[8 : 8 + n]), rng)).encode()
    return struct.pack("<Q", len(header)) + header + data[8 + n :]


def in_npy(data: bytes, rng: random.Random) -> bytes:
    """The header of an array, which is a Python literal: type, order or shape."""
    n = int.from_bytes(data[8:10], "little")
    header = data[10 : 10 + n].decode()
    old = rng.choice(("<f4", "False", "(", ", ", "descr", "shape"))
    new = rng.choice(
        ("|O", "<f2", "<i8", "<c8", "|S4", "<U9", "<M8[s]", "True", "(-1, ", "(10**9, ", "(2**62, ", "x", "(")
    )
    changed = header.replace(old, new, 1).encode()
    return data[:8] + struct.pack("<H", min(len(changed), 65535)) + changed + data[10 + n :]


def in_npz(data: bytes, rng: random.Random) -> bytes:
    """One of the arrays, or their names; now and then a long one in few bytes."""
    with zipfile.ZipFile(io.BytesIO(data)) as file:
        parts = {name: file.read(name) for name in file.namelist()}
    name = rng.choice(list(parts))
    way = rng.random()
    if way < 0.6:
        parts[name] = (in_npy if rng.random() < 0.6 else in_bytes)(parts[name], rng)
    elif way < 0.8:
        parts[rng.choice(("x.npy", "about.npy", "a/b/c.npy", "", "../x.npy", "about"))] = parts.pop(name)
    elif way < 0.9:
        del parts[name]
    else:
        parts[name] = parts[name][:10] + parts[name][10:].ljust(4 << 20, b"\0")
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w", rng.choice((zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED))) as file:
        for name, part in parts.items():
            file.writestr(name or "x", part)
    return made.getvalue()
