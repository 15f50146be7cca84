"""The errors a user can cause. Apart from types.py, so that `sae-jax --help` need not wait for JAX."""

from __future__ import annotations


class UserError(Exception):
    """Something a user can cause and cure. The message is one line: the value, the limit, the cure.

    Commands print it without a traceback and leave with `exit_code`.
    """

    exit_code = 1


class UsageError(UserError):
    """A wrong argument: a misspelt key, a value out of range, a name that does not exist."""

    exit_code = 2


class PartialError(UserError):
    """Some of what was asked for is done, and the rest is not: the message names it."""

    exit_code = 3
