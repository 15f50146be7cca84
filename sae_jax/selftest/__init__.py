"""Whether a machine that somebody has just got computes, sends and stores what it should: `sae-jax selftest`.

Each part is a function of its own, `part(where) -> figures`, that raises MismatchError where something is not as it
should be. They run in the order of PARTS on all processes of a job, and all processes say what they saw. A part
compares only once all of its exchanges are over: the others would wait for one that has found something.
"""

from sae_jax.selftest.checks import LeftOutError, MismatchError, Where
from sae_jax.selftest.run import PARTS, selftest

__all__ = ["PARTS", "LeftOutError", "MismatchError", "Where", "selftest"]
