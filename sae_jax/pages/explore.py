"""The dashboard of a dictionary on a local server that has its language model: `sae-jax explore`.

    GET  /                the page of the site, with the views that need a model (templates/explore*.js)
    GET  /api/about       what the model can be asked (explorer.py)
    POST /api/latents     {"text": ...} -> the latents of a text
    POST /api/steer       {"prompt": ..., "latents": [...]} -> lines of JSON, as the text is written
    GET  anything else    a file of the site

Errors are {"error": one line}. The model runs in one thread, a text or a token at a time, so that several readers share
it; what nobody waits for any more is not begun.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import secrets
import socket
import tempfile
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib.resources import files
from pathlib import Path
from typing import Any, TypeVar

import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles

from sae_jax import storage
from sae_jax.artifact import Dictionary, digest_of
from sae_jax.evaluation import prompts
from sae_jax.evaluation.text import open_set
from sae_jax.pages import dashboard, guard
from sae_jax.pages.explorer import Explorer, SteerRequest, TextRequest
from sae_jax.pages.site import about, write_site
from sae_jax.progress import console
from sae_jax.types import UsageError, UserError

SCRIPTS = ("explore.js", "explore_text.js", "explore_steer.js", "explore_chat.js")
STYLES = ("explore.css",)
SECONDS_TO_CLOSE = 2

_TYPES = {".js": "text/javascript", ".css": "text/css"}
T = TypeVar("T")


def explore(
    d: Dictionary,
    title: str,
    *,
    site: str | os.PathLike[str] | None = None,
    port: int = 0,
    data: str | None = None,
    model: str | None = None,
    n_tokens: int = 400_000,
    split: int = 1,
    store: str | os.PathLike[str] | None = None,
) -> None:
    """Serve the pages of a dictionary until Ctrl-C.

    Args:
        d: the dictionary.
        title: what the pages are headed with.
        site: its dashboard, which is written if it is not there; None: a temporary folder.
        port: to listen on; 0: any that is free.
        data: the activation set; default: the one the dictionary was trained on.
        model: another reference for the language model, if it moved.
        n_tokens: of a dashboard that is written, tokens of the set's text to show examples from.
        split: devices that the language model is split over.
        store: of a dashboard that is written, where the activations of the sample are kept.

    Raises:
        UsageError: something else at `site`, or the dashboard of another dictionary; a port that is taken.
    """
    with contextlib.ExitStack() as stack:
        listening = stack.enter_context(listen(port))  # first, since all else takes minutes
        if site is None:
            site = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="sae-jax-"))) / "site"
        if storage.is_url(site):
            raise UsageError(f"{site}: what is served lies on a disk; copy the dashboard, and name its folder")
        site = Path(site)
        if site.exists():
            refuse_another(site, digest_of(d.sae))
        else:
            write_site(d, title, site, data, model, n_tokens, split, store)
        explorer, why_not = None, ""
        try:
            explorer = Explorer(_subject(d, data, model, split))
        except UserError as error:
            why_not = str(error)
            console.print(f"pages are without texts, steering and chat: {why_not}")
        for program in explorer.warm_up() if explorer else ():
            console.print(f"warming up: {program} ...")
        address, thread = stack.enter_context(serving(listening, site, title, about(d.record), explorer, why_not))
        console.print(f"{address}\nopen this address in a browser; Ctrl-C ends it")
        try:
            wait_for(thread)
        except KeyboardInterrupt:
            console.print("ended")


def refuse_another(site: Path, digest: str) -> None:
    """UsageError if what is at `site` is no dashboard of this version, or not that of the dictionary with `digest`."""
    dashboard.refuse_to_overwrite(site)
    try:
        if any((site / name).read_bytes() != _of_package(name) for name in dashboard.SCRIPTS):
            raise UsageError(f"{site} was written by another version of sae_jax; remove it, so that it is made anew")
        index = (site / "data" / "index.js").read_text("ascii", errors="replace")
        shown = json.loads(index[index.index("(") + 1 : index.rindex(")")]).get("digest", digest)
    except (OSError, ValueError, AttributeError):
        raise UsageError(f"{site} lacks files, or is damaged; remove it, so that it is made anew") from None
    if shown != digest:
        raise UsageError(
            f"{site} is the dashboard of another dictionary; choose another folder, or remove it to have it made anew"
        )


def wait_for(server: threading.Thread) -> None:
    """Until it ends, which it does not by itself, or Ctrl-C."""
    server.join()


def _subject(d: Dictionary, data: str | None, model: str | None, split: int) -> prompts.Subject:
    try:
        activations = open_set(d.record, data)
    except UserError:  # the model can be asked all the same
        if data is not None:
            raise
        activations = None
    return prompts.subject(d.sae, d.record, activations, model, split)


def listen(port: int) -> socket.socket:
    """A socket at this port of this machine, 0 for any that is free. UsageError if it is taken."""
    try:
        return socket.create_server(("127.0.0.1", port))
    except OSError as error:
        raise UsageError(f"--port={port} cannot be used ({storage.one_line(error)}); leave it out for any") from None


@contextlib.contextmanager
def serving(
    listening: socket.socket, site: Path, title: str, about: str, explorer: Explorer | None, why_not: str = ""
) -> Iterator[tuple[str, threading.Thread]]:
    """A server on this machine: its address, and the thread that it runs in, to its end.

    Args:
        listening: where readers connect.
        site: folder of the dashboard.
        title: what the pages are headed with.
        about: the dictionary in a line.
        explorer: of its language model; None: there is none, and
        why_not: says why.
    """
    token = secrets.token_urlsafe(24)
    model_thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="model")
    app = guard.Guard(
        _app(site, dashboard.page_html(title, about, SCRIPTS, STYLES), explorer, why_not, model_thread), token
    )
    quiet: dict[str, Any] = {"log_config": None, "log_level": "error", "access_log": False, "server_header": False}
    plain: dict[str, Any] = {"lifespan": "off", "ws": "none", "proxy_headers": False}
    server = uvicorn.Server(uvicorn.Config(app, **quiet, **plain, timeout_graceful_shutdown=SECONDS_TO_CLOSE))
    thread = threading.Thread(target=server.run, args=([listening],), name="server")
    thread.start()
    try:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}/{token}/", thread
    finally:
        server.should_exit = True
        thread.join()
        model_thread.shutdown(cancel_futures=True)


def _app(site: Path, page: str, explorer: Explorer | None, why_not: str, model_thread: ThreadPoolExecutor) -> Starlette:
    async def of_model(request: Request, work: Callable[[], T]) -> T:
        """What `work` returns in the thread of the model, unless nobody waits for it when its turn comes."""
        gone = asyncio.Event()

        def begin() -> T:
            if gone.is_set():
                raise guard.RefusedError(408, "nobody waits for this any more")
            return work()

        doing = asyncio.ensure_future(asyncio.get_running_loop().run_in_executor(model_thread, begin))
        watching = asyncio.ensure_future(_wait_until_gone(request))
        await asyncio.wait((doing, watching), return_when=asyncio.FIRST_COMPLETED)
        if not doing.done():
            gone.set()
        watching.cancel()
        return await doing

    def model() -> Explorer:
        if explorer is None:
            raise guard.RefusedError(409, why_not)
        return explorer

    async def show(request: Request) -> Response:
        return Response(page, media_type="text/html")

    async def tell_about(request: Request) -> Response:
        return guard.answer(explorer.about() if explorer else {"noModel": why_not})

    async def latents(request: Request) -> Response:
        asked = await guard.body_as(TextRequest, request)
        return guard.answer(await of_model(request, lambda: model().latents(asked)))

    async def steer(request: Request) -> Response:
        asked = await guard.body_as(SteerRequest, request)
        sides = await of_model(request, lambda: model().sides(asked))
        return StreamingResponse(_lines(sides, model_thread), media_type="application/x-ndjson")

    def refused(request: Request, error: Exception) -> Response:
        status = error.status if isinstance(error, guard.RefusedError) else 400
        return guard.error(status, str(error))

    def http_error(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        return guard.error(error.status_code, f"{request.url.path}: {error.detail}")

    def failed(request: Request, error: Exception) -> Response:
        return guard.error(500, f"this failed: {storage.one_line(error)}")

    handlers: dict[Any, Any] = {UserError: refused, HTTPException: http_error, Exception: failed}
    routes = [
        *(Route(path, show) for path in ("/", "/index.html")),
        *(_file(name) for name in (*STYLES, *SCRIPTS)),
        Route("/api/about", tell_about),
        Route("/api/latents", latents, methods=["POST"]),
        Route("/api/steer", steer, methods=["POST"]),
        Mount("/", StaticFiles(directory=site)),
    ]
    return Starlette(routes=routes, exception_handlers=handlers)


async def _wait_until_gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _lines(sides: dict[str, Iterator[dict[str, Any]]], model_thread: ThreadPoolExecutor) -> AsyncIterator[str]:
    """Lines of JSON of what is written, a token of each side in turn. Cancelled when the reader goes."""
    loop = asyncio.get_running_loop()
    while sides:
        for side, written in list(sides.items()):
            try:
                event = await loop.run_in_executor(model_thread, next, written, None)
            except UserError as error:
                event, _ = {"error": str(error)}, sides.pop(side)
            except Exception as error:
                event, _ = {"error": f"this failed: {storage.one_line(error)}"}, sides.pop(side)
            if event is None:
                del sides[side]
            else:
                yield json.dumps({"side": side, **event}) + "\n"


def _of_package(name: str) -> bytes:
    """A script or style as this version has it."""
    return (files("sae_jax.pages") / "templates" / name).read_bytes()


def _file(name: str) -> Route:
    """A file that comes with this package."""
    content = _of_package(name)

    async def send(request: Request) -> Response:
        return Response(content, media_type=_TYPES[Path(name).suffix])

    return Route(f"/{name}", send)
