"""The judge: a language model behind an OpenAI-compatible endpoint, `/v1/chat/completions`.

What can be used of its answers is kept on disk under the request, so that a resumed run does not pay for it again. An
answer that is of no use is not kept: it is asked for anew.

    tried again    429, 408, 409, 425 and 5xx, a connection that breaks, no whole answer in time, an answer of no use
                   (once). It waits as long as Retry-After says, or 1, 2, 4, ... seconds
    given up       the request, after `tries`, and at any other 4xx: RequestError
    ends the run   401 and 403, 404, a redirection, nothing that answers at all, and GIVE_UP_AFTER requests in a row
                   that came to nothing: JudgeError

Redirections are not followed, since they would take the key elsewhere. Proxies of the environment are not used.
"""

from __future__ import annotations

import contextlib
import email.utils
import hashlib
import http.client
import json
import os
import random
import socket
import threading
import time
import urllib.parse
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeVar

import msgspec

from sae_jax import storage
from sae_jax.errors import UsageError, UserError

T = TypeVar("T")

GIVE_UP_AFTER = 5  # requests in a row that came to nothing
USELESS_TRIES = 2
FIRST_WAIT, LONGEST_WAIT = 1.0, 60.0  # seconds between tries, where the endpoint does not say
LONGEST_RETRY_AFTER = 600.0  # seconds; an endpoint that asks for more is given up
MAX_TOKENS, MAX_BYTES = 4096, 2**24  # of an answer
TRANSIENT = (408, 409, 425, 429)  # and from 500 on


class RequestError(Exception):
    """A request came to nothing; why, in a few words."""


class JudgeError(UserError):
    """No request can come to anything."""


class UselessError(Exception):
    """An answer from which nothing can be read; what is wrong with it."""


@dataclass(frozen=True)
class JudgeConfig:
    """Where the judge is, and how it is asked."""

    endpoint: str
    """its URL, as in http://localhost:8000/v1"""
    model: str
    """what the endpoint calls it"""
    key_env: str = "SAE_JAX_API_KEY"
    """environment variable that has the key of the endpoint, if it wants one"""
    timeout: float = 120.0
    """seconds until a request must have its whole answer"""
    tries: int = 4
    """of a request"""
    per_minute: float = 0.0
    """requests a minute; 0: as many as it answers"""
    concurrency: int = 4
    """requests at a time"""
    price: tuple[float, float] = (0.0, 0.0)
    """of a million prompt tokens, and of a million completion tokens, in whatever money; for the report of costs"""

    def __post_init__(self) -> None:
        parts = _split(self.endpoint)
        if parts is None or parts.scheme not in ("http", "https") or not parts.hostname:
            raise UsageError(f"endpoint={self.endpoint!r} is no URL; give one such as http://localhost:8000/v1")
        if "@" in parts.netloc:
            raise UsageError(f"the endpoint's URL has a password; give the key in the environment as {self.key_env}")
        if not 0 < self.timeout < float("inf"):
            raise UsageError(f"timeout={self.timeout} must be above 0 and finite")
        for name in ("tries", "concurrency"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name}={getattr(self, name)} must be at least 1")
        for name, value in (("per_minute", self.per_minute), *(("price", price) for price in self.price)):
            if not 0 <= value < float("inf"):
                raise UsageError(f"{name}={value} must be 0 or more, and finite")

    @property
    def url(self) -> str:
        """Where requests go."""
        url = self.endpoint.rstrip("/")
        if url.endswith("/chat/completions"):
            return url
        path = urllib.parse.urlsplit(url).path
        return f"{url}/chat/completions" if path else f"{url}/v1/chat/completions"


@dataclass
class Usage:
    """What was asked, and what it cost."""

    requests: int = 0  # that were sent
    kept: int = 0  # answers that were there from before
    prompt_tokens: int = 0
    completion_tokens: int = 0
    untold: int = 0  # answers that do not say how many tokens they took

    def report(self, price: tuple[float, float]) -> str:
        """A line."""
        cost = (self.prompt_tokens * price[0] + self.completion_tokens * price[1]) / 1e6
        return (
            f"{self.requests:,} requests, {self.kept:,} answers kept from before; {self.prompt_tokens:,} prompt and "
            f"{self.completion_tokens:,} completion tokens"
            + (f", and {self.untold:,} answers that do not say" if self.untold else "")
            + (f"; {cost:.4g} at the prices given" if any(price) else "")
        )


class Judge:
    """Asks, from several threads. A context manager; leaving it ends requests under way."""

    def __init__(self, config: JudgeConfig, path: storage.StrPath) -> None:
        """Answers are kept in the file `path`. UsageError for a key that cannot be one."""
        self.config, self.usage = config, Usage()
        self._key = os.environ.get(config.key_env, "").strip()
        if not (self._key.isascii() and (self._key.isprintable())):
            raise UsageError(f"the key in {config.key_env} is no line of ASCII; set it anew")
        self._kept = {row["request"]: row["answer"] for row in storage.read_lines(path) if row.keys() >= _KEPT}
        self._lines = storage.Lines(path)
        self._lock, self._stopped, self._is_closed = threading.Lock(), threading.Event(), False
        self._connected: set[socket.socket] = set()
        self._next = 0.0  # when the next request may be sent, by time.monotonic
        self._in_vain, self._has_answered = 0, False
        self._why = "asking has ended"

    def __enter__(self) -> Judge:
        return self

    def __exit__(self, *error: object) -> None:
        self._stopped.set()
        with self._lock:
            for connected in self._connected:
                _hang_up(connected)
            self._is_closed = True
            self._lines.close()

    def ask(self, prompt: str, read: Callable[[str], T]) -> T:
        """What `read` makes of the answer; it raises UselessError for one from which nothing can be read.

        Raises RequestError, or JudgeError.
        """
        messages = [{"role": "user", "content": prompt}]
        body = {"model": self.config.model, "messages": messages, "temperature": 0, "max_tokens": MAX_TOKENS}
        data = json.dumps(body, sort_keys=True).encode()
        name = hashlib.sha256(self.config.url.encode() + b"\n" + data).hexdigest()
        if name in self._kept:
            with contextlib.suppress(UselessError):
                value = read(self._kept[name])
                with self._lock:
                    self.usage.kept += 1
                return value
        try:
            answer, value = self._until_useful(data, read)
        except JudgeError as error:
            self._end(f"{error}")
            raise
        except RequestError as error:
            with self._lock:
                self._in_vain += 1
                if self._in_vain < GIVE_UP_AFTER or self._stopped.is_set():
                    raise
            said = f"{self._in_vain} requests in a row came to nothing, the last as {error}; see the endpoint"
            self._end(said)
            raise JudgeError(said) from None
        with self._lock:
            self._in_vain = 0
            self._kept[name] = answer
            if not self._is_closed:
                self._lines.write({"request": name, "answer": answer})
        return value

    def _end(self, why: str) -> None:
        """Nothing more is asked."""
        with self._lock:
            if not self._stopped.is_set():
                self._why = why
            self._stopped.set()

    def _until_useful(self, data: bytes, read: Callable[[str], T]) -> tuple[str, T]:
        wait, useless = FIRST_WAIT, 0
        for tries_left in reversed(range(self.config.tries)):
            self._wait_for_turn()
            try:
                answer = self._send(data)
                return answer, read(answer)
            except UselessError as error:
                useless += 1
                if useless == USELESS_TRIES or not tries_left:
                    raise RequestError(f"an answer of no use ({error})") from None
            except _AgainError as again:
                if not tries_left:
                    raise RequestError(str(again)) from None
                if again.after is None:
                    self._stopped.wait(wait * random.uniform(0.5, 1))
                    wait = min(2 * wait, LONGEST_WAIT)
                elif again.after > LONGEST_RETRY_AFTER:
                    raise RequestError(f"{again}, which asks to wait {again.after:,.0f} s") from None
                else:
                    with self._lock:  # it means all who ask
                        self._next = max(self._next, time.monotonic() + again.after)
        raise AssertionError("the last try returns or raises")

    def _wait_for_turn(self) -> None:
        while True:
            with self._lock:
                seconds = self._next - time.monotonic()
                if seconds <= 0:
                    self._next = time.monotonic() + (60 / self.config.per_minute if self.config.per_minute else 0)
            if self._stopped.wait(max(seconds, 0)):
                raise RequestError(self._why)
            if seconds <= 0:
                return

    def _send(self, data: bytes) -> str:
        """The text of one answer."""
        with self._lock:
            self.usage.requests += 1
        status, headers, content = self._post(data)
        self._has_answered = True
        if status != 200:
            raise self._refusal(status, headers, content)
        try:
            answer = msgspec.json.decode(content, type=_Answer)
        except (msgspec.MsgspecError, RecursionError, UnicodeError) as error:
            raise _AgainError(f"what is no answer of a chat ({self._redacted(storage.one_line(error))})") from None
        with self._lock:
            tokens = answer.usage or _Tokens()
            self.usage.untold += tokens.prompt_tokens is None or tokens.completion_tokens is None
            self.usage.prompt_tokens += tokens.prompt_tokens or 0
            self.usage.completion_tokens += tokens.completion_tokens or 0
        if not answer.choices or answer.choices[0].message.content is None:
            raise UselessError("it has no text")
        return self._redacted(answer.choices[0].message.content)

    def _post(self, data: bytes) -> tuple[int, http.client.HTTPMessage, bytes]:
        parts = urllib.parse.urlsplit(self.config.url)
        kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        seconds = self.config.timeout
        connection = kind(parts.hostname or "", parts.port, timeout=seconds)
        headers = {"Content-Type": "application/json", "Connection": "close"}
        headers |= {"Authorization": f"Bearer {self._key}"} if self._key else {}
        begun = time.monotonic()
        try:
            connection.connect()
            with self._connected_for(connection.sock, max(seconds - (time.monotonic() - begun), 0)):
                path = f"{parts.path}?{parts.query}" if parts.query else parts.path
                connection.request("POST", path, data, headers)
                response = connection.getresponse()
                content = response.read(MAX_BYTES + 1)
                is_whole = not response.length  # None, or what is still to come
        except (OSError, http.client.HTTPException, ValueError) as error:
            if time.monotonic() - begun >= seconds:
                raise _AgainError(f"no whole answer in {seconds:g} s") from None
            if isinstance(error, ConnectionRefusedError | socket.gaierror) and not self._has_answered:
                where = f"{self.config.url} ({storage.one_line(error)})"
                raise JudgeError(f"nothing answers at {where}; start the endpoint, or give another") from None
            raise _AgainError(f"a broken connection ({storage.one_line(error) or type(error).__name__})") from None
        finally:
            connection.close()
        if time.monotonic() - begun >= seconds:
            raise _AgainError(f"no whole answer in {seconds:g} s")
        if len(content) > MAX_BYTES:
            raise _AgainError(f"an answer of more than {MAX_BYTES:,} bytes")
        if not is_whole:
            raise _AgainError("a broken connection (before the end of the answer)")
        return response.status, response.headers, content

    @contextlib.contextmanager
    def _connected_for(self, connected: socket.socket, seconds: float) -> Iterator[None]:
        """Hang up after so many seconds: the timeout of a socket begins anew with every byte."""
        timer = threading.Timer(seconds, _hang_up, [connected])
        timer.daemon = True
        with self._lock:
            self._connected.add(connected)
        timer.start()
        try:
            yield
        finally:
            timer.cancel()
            with self._lock:
                self._connected.discard(connected)

    def _refusal(self, status: int, headers: http.client.HTTPMessage, content: bytes) -> Exception:
        said = f"{status} ({self._redacted(_message(content))})"
        if status in (401, 403):
            cure = f"see the key in {self.config.key_env}" if self._key else f"give its key as {self.config.key_env}"
            return JudgeError(f"the endpoint refuses with {said}; {cure} in the environment")
        if status == 404:
            return JudgeError(f"{self.config.url} has no {self.config.model}, or is no endpoint: {said}; see both")
        if 300 <= status < 400:
            there = self._redacted(headers.get("Location", "nowhere"))
            return JudgeError(f"{self.config.url} sends on to {there} with {status}; give the endpoint that is meant")
        if status in TRANSIENT or status >= 500:
            return _AgainError(said, _seconds(headers.get("Retry-After")))
        return RequestError(said)

    def _redacted(self, text: str) -> str:
        return text.replace(self._key, "<key>") if self._key else text


_KEPT = {"request", "answer"}


class _AgainError(Exception):
    """What may go better next time, after some seconds if it says so."""

    def __init__(self, what: str, after: float | None = None) -> None:
        super().__init__(what)
        self.after = after


class _Message(msgspec.Struct):
    content: str | None = None


class _Choice(msgspec.Struct):
    message: _Message


class _Tokens(msgspec.Struct):
    prompt_tokens: int | None = None
    completion_tokens: int | None = None


class _Answer(msgspec.Struct):
    choices: list[_Choice]
    usage: _Tokens | None = None


def _split(url: str) -> urllib.parse.SplitResult | None:
    with contextlib.suppress(ValueError):
        parts = urllib.parse.urlsplit(url)
        _ = parts.port  # which may be no number
        return parts
    return None


def _hang_up(connected: socket.socket) -> None:
    with contextlib.suppress(OSError):
        # That of the plain socket: the one of TLS takes itself apart under a thread that reads.
        socket.socket.shutdown(connected, socket.SHUT_RDWR)


def _message(content: bytes) -> str:
    """What the body of a refusal says, in a line."""
    text = content[:2000].decode("utf-8", "replace")
    with contextlib.suppress(UserError):
        body = storage.parse_json(content, "")
        error = body.get("error", body) if isinstance(body, dict) else body
        text = str(error.get("message", error)) if isinstance(error, dict) else str(error)
    return " ".join(text.split())[:200]


def _seconds(retry_after: str | None) -> float | None:
    """Of a Retry-After header, a number or a date; None if it says nothing that can be read."""
    if retry_after is None:
        return None
    with contextlib.suppress(ValueError):
        seconds = float(retry_after)
        return max(seconds, 0.0) if seconds == seconds else None
    with contextlib.suppress(ValueError, TypeError):
        return max(email.utils.parsedate_to_datetime(retry_after).timestamp() - time.time(), 0.0)
    return None
