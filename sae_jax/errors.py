"""The errors a user can cause. Apart from types.py, so that `sae-jax --help` need not wait for JAX."""

from __future__ import annotations

LONGEST = 2000  # characters of a message


class UserError(Exception):
    """Something a user can cause and cure. The message is one line: the value, the limit, the cure.

    Commands print it without a traceback and leave with `exit_code`.
    """

    exit_code = 1

    def __str__(self) -> str:
        """One line of bounded length, whatever names and values of a file are in it."""
        text = super().__str__()
        return printable(text if len(text) <= LONGEST else f"{text[: LONGEST // 2]} ... {text[-LONGEST // 4 :]}")


def printable(text: str) -> str:
    """Text from a file as a terminal can show it, with escapes for what is no character."""
    if text.isprintable():
        return text
    return "".join(each if each.isprintable() else each.encode("unicode_escape").decode() for each in text)


class UsageError(UserError):
    """A wrong argument: a misspelt key, a value out of range, a name that does not exist."""

    exit_code = 2


class PartialError(UserError):
    """Some of what was asked for is done, and the rest is not: the message names it."""

    exit_code = 3
