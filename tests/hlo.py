"""What an optimised program holds, read from its text."""

from __future__ import annotations

import math
import re

# f32[16,64]{1,0}, bf16[], pred[8]: a type, its dimensions; bounded dynamic ones print as <=64.
_ARRAY = re.compile(r"\b(?:pred|bf16|f8\w*|[sufc]\d+)\[([\d,<=]*)\]")


def largest_array(text: str) -> int:
    """Elements of the largest array that `compiled.as_text()` names on a device, arguments and results included.

    Values inside a fusion count too although they get no buffer, so the answer may be too large, never too small.
    """
    shapes = (found.replace("<=", "").split(",") for found in _ARRAY.findall(text))
    return max((math.prod(int(size) for size in shape if size) for shape in shapes), default=0)
