"""Reading a tokenizer in a process of its own first: what is odd in it aborts the whole process, or never ends."""

from __future__ import annotations

import functools
import itertools
import math
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec

from sae_jax import storage
from sae_jax.types import UserError

CHILD_SECONDS = 300  # of the clock, for a process that reads a file first
# And where the system limits them, seconds of the processor and bytes of memory.
PROCESSOR_SECONDS, PROCESSOR_SECONDS_PER_BYTE = 1, 1e-6
MEMORY_BYTES, MEMORY_BYTES_PER_BYTE = 1 << 29, 30
CONVERSION_SECONDS, CONVERSION_BYTES = 120, 1 << 33  # importing transformers may import torch
_LIMITED = """
import sys
try:
    import resource
    resource.setrlimit(resource.RLIMIT_CPU, (int(sys.argv[1]), int(sys.argv[1])))
    resource.setrlimit(resource.RLIMIT_DATA, (int(sys.argv[2]), int(sys.argv[2])))
except ImportError:
    pass
"""
_TRIAL = f"""{_LIMITED}
import tokenizers
tokenizer = tokenizers.Tokenizer.from_str(sys.stdin.buffer.read().decode())
tokenizer.encode_special_tokens = True
texts = ["", "a", "def f(x):\\n    return x + 1\\n", "Größe \\u4e2d\\u6587 \\U0001f600", " " * 300, "x" * 300]
for ids in [each.ids for each in tokenizer.encode_batch_fast(texts, add_special_tokens=False)]:
    tokenizer.decode(ids, skip_special_tokens=False)
tokenizer.decode_batch([[i] for i in list(tokenizer.get_vocab().values())[:10000]], skip_special_tokens=False)
"""
_CONVERSION = f"""{_LIMITED}
import json
answer, sys.stdout = sys.stdout, sys.stderr
from transformers import AutoTokenizer
try:
    loaded = AutoTokenizer.from_pretrained(sys.argv[3])
    named = {{"bos": loaded.bos_token, "eos": loaded.eos_token, "special": loaded.all_special_tokens}}
    json.dump({{**named, "state": json.loads(loaded.backend_tokenizer.to_str())}}, answer)
except Exception as error:
    sys.exit(str(error).partition("\\n")[0])
"""
_OUT_OF_TIME = (-signal.SIGXCPU, -signal.SIGKILL) if hasattr(signal, "SIGXCPU") else ()  # as systems end it


@functools.lru_cache(maxsize=8)
def try_out(text: str) -> None:
    """Read a tokenizer.json, encode and decode. Raises UserError saying what the library said."""
    data = text.encode()
    seconds = PROCESSOR_SECONDS + math.ceil(PROCESSOR_SECONDS_PER_BYTE * len(data))
    _in_a_child(_TRIAL, seconds, MEMORY_BYTES + MEMORY_BYTES_PER_BYTE * len(data), data)


class Converted(msgspec.Struct):
    """What transformers makes of the files of a tokenizer without tokenizer.json."""

    state: dict[str, Any]  # the tokenizer.json
    bos: str | None
    eos: str | None
    special: list[str]


def convert(folder: Path) -> Converted:
    """Of a folder without tokenizer.json. Raises UserError if transformers cannot read what it has."""
    try:
        answer = _in_a_child(_CONVERSION, CONVERSION_SECONDS, CONVERSION_BYTES, b"", str(folder))
    except UserError as error:
        reason = str(error).removeprefix("its tokenizer.json ")
        raise UserError(f"{folder} has no tokenizer that can be read: what it has {reason}") from None
    return storage.parse_json(answer, folder, Converted)


def _in_a_child(program: str, seconds: int, n_bytes: int, data: bytes, *words: str) -> bytes:
    """What a program writes, within limits. Raises UserError saying what the library said."""
    command = [sys.executable, "-I", "-c", program, str(seconds), str(n_bytes), *words]
    try:
        done = subprocess.run(command, input=data, capture_output=True, timeout=CHILD_SECONDS)
    except subprocess.TimeoutExpired:
        raise UserError(f"its tokenizer.json keeps the tokenizer busy for over {CHILD_SECONDS} s") from None
    if done.returncode in _OUT_OF_TIME:
        raise UserError(f"its tokenizer.json keeps the tokenizer busy for over {seconds} s of the processor")
    if done.returncode:
        said = [line for line in done.stderr.decode(errors="replace").splitlines() if line.strip()]
        # What follows a panic is a note on backtraces; what it is about stands below where it was.
        panics = [after for line, after in itertools.pairwise(said) if "panicked at" in line]
        reason = panics[0] if panics else said[-1] if said else f"exit code {done.returncode}"
        raise UserError(f"its tokenizer.json cannot be used: {reason[:200]}")
    return done.stdout
