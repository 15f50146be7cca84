"""The local server: who it answers, what it refuses, and several readers at once. Its model here is a stub."""

from __future__ import annotations

import contextlib
import http.client
import json
import threading
import time
from urllib.parse import urlsplit

import pytest

from sae_jax.pages import explore, guard
from sae_jax.types import UsageError, UserError
from tests.pages import test_dashboard

JSON = {"Content-Type": "application/json"}
STEER = {"prompt": "a", "latents": [{"latent": 1, "value": 2.0}]}


class Model:
    """Answers at once; texts can be held up, and what is written goes on until nobody reads it."""

    def __init__(self):
        self.asked, self.n_written = [], 0
        self.held, self.begun = threading.Event(), threading.Event()

    def about(self):
        return {"nContext": 9}

    def latents(self, asked):
        self.asked.append(asked.text)
        if asked.text == "hold":
            self.begun.set()
            assert self.held.wait(30)
        if asked.text == "wrong":
            raise UserError("that is wrong; say another")
        if asked.text == "bug":
            raise RuntimeError("a bug\nof two lines")
        return {"tokens": [asked.text]}

    def sides(self, asked):
        def write(side):
            for number in range(asked.n_tokens):
                time.sleep(0.01)
                self.n_written += 1
                if asked.seed and number == 3:
                    raise UserError("no numbers")
                yield {"text": f"{side}{number} "}
            yield {"text": "", "end": "done"}

        return {side: write(side) for side in ("unsteered", "steered")}


@contextlib.contextmanager
def serving(*what):
    """`explore.serving` at some port."""
    with explore.listen(0) as listening, explore.serving(listening, *what) as served:
        yield served


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = test_dashboard.write(tmp_path_factory.mktemp("explore") / "site")
    (folder.parent / "secret").write_text("secret")
    (folder / "link").symlink_to(folder.parent / "secret")
    return folder


@pytest.fixture
def model():
    return Model()


@pytest.fixture
def address(folder, model):
    with serving(folder, "<b>t</b>", "about", model) as (address, _):
        yield address
        model.held.set()


def send(address, method="GET", path="", content=None, headers=(), host=None):
    """(status, headers, body) of a request with just these headers."""
    place = urlsplit(address)
    connection = http.client.HTTPConnection(place.netloc, timeout=30)
    connection.putrequest(method, place.path + path, skip_host=True, skip_accept_encoding=True)
    body = None if content is None else content if isinstance(content, bytes) else json.dumps(content).encode()
    given = {"Host": host or place.netloc, **dict(headers)}
    if body is not None and "Transfer-Encoding" not in given:
        given.setdefault("Content-Length", str(len(body)))
    for name, value in given.items():
        connection.putheader(name, value)
    connection.endheaders(body)
    answer = connection.getresponse()
    return answer.status, answer.headers, answer.read()


def post(address, path, content, headers=JSON, **options):
    status, _, body = send(address, "POST", path, content, headers, **options)
    return status, body


def refusal(status, body):
    content = json.loads(body)
    assert list(content) == ["error"]
    assert "\n" not in content["error"]
    return status, content["error"]


# ---- what is served


def test_the_page_is_that_of_the_site_with_more_views(address, folder):
    status, headers, body = send(address)
    assert (status, headers["Content-Type"]) == (200, "text/html; charset=utf-8")
    page = body.decode()
    assert "&lt;b&gt;t&lt;/b&gt;" in page
    assert "<b>t" not in page
    for name in ("app.js", "explore.js", "explore_text.js", "explore_steer.js", "explore_chat.js", "explore.css"):
        assert f'"{name}"' in page
        status, headers, _ = send(address, path=name)
        assert status == 200
        assert headers["Content-Type"].startswith("text/css" if name.endswith("css") else "text/javascript")
    assert send(address, path="data/index.js")[2] == (folder / "data" / "index.js").read_bytes()
    assert json.loads(send(address, path="api/about")[2]) == {"nContext": 9}
    assert post(address, "api/latents", {"text": "x"}) == (200, b'{"tokens": ["x"]}')
    status, body = post(address, "api/steer", STEER | {"n_tokens": 2})
    events = [json.loads(line) for line in body.splitlines()]
    assert [event["side"] for event in events] == ["unsteered", "steered"] * 3
    assert [event["text"] for event in events] == ["unsteered0 ", "steered0 ", "unsteered1 ", "steered1 ", "", ""]
    assert [event.get("end") for event in events][-2:] == ["done", "done"]


def test_every_answer_forbids_scripts_from_elsewhere_and_keeping_it(address):
    for status, headers, _ in (send(address), send(address, path="nowhere"), send("http" + address[4:-5])):
        assert status in (200, 403, 404)
        policy = headers["Content-Security-Policy"]
        assert "default-src 'self'" in policy
        assert "unsafe" not in policy
        assert headers["Cache-Control"] == "no-store"
        assert headers["Referrer-Policy"] == "no-referrer"
        assert headers["X-Content-Type-Options"] == "nosniff"
        assert "Access-Control-Allow-Origin" not in headers


def test_it_listens_on_this_machine_alone(address):
    assert urlsplit(address).hostname == "127.0.0.1"
    assert len(urlsplit(address).path) > 30


def test_a_port_that_is_taken_is_refused(address):
    port = urlsplit(address).port
    with pytest.raises(UsageError, match=rf"--port={port} cannot be used .* leave it out for any"):
        explore.listen(port)


# ---- who is refused


@pytest.mark.parametrize("token", ["", "/", "/x", "/x/", "//", "/%00/", "/%C3%A9/"])
@pytest.mark.parametrize("path", ["", "api/about", "data/index.js"])
def test_without_the_token_nothing_is_told(address, token, path):
    place = urlsplit(address)
    status, _, body = send(f"http://{place.netloc}{token}", path=path or ("/" if not token else ""))
    assert refusal(status, body) == (
        403,
        "the token in the address is missing or wrong; use the one that sae-jax explore printed",
    )


def test_a_token_that_is_almost_right_is_wrong(address):
    for wrong in (address[:-2] + "/", address[:-1] + "x/", address[:-1], address.swapcase().replace("HTTP", "http")):
        if wrong != address:
            assert send(wrong)[0] == 403


def test_another_name_for_this_machine_is_refused(address):
    port = urlsplit(address).port
    for host in ("evil.example", f"evil.example:{port}", "127.0.0.1.evil.example", "", "[", "0.0.0.0"):
        status, _, body = send(address, host=host or " ")
        assert refusal(status, body)[0] == 421
    for host in ("localhost", f"localhost:{port}", "127.0.0.1:9999", "[::1]:8000"):  # of a forwarded port, too
        assert send(address, host=host)[0] == 200


def test_another_site_is_refused(address, model):
    host = urlsplit(address).netloc
    for headers in (
        {"Origin": "http://evil.example"},
        {"Origin": "null"},
        {"Origin": f"https://{host}"},
        {"Origin": "http://127.0.0.1:1"},
        {"Sec-Fetch-Site": "cross-site"},
        {"Sec-Fetch-Site": "same-site"},
    ):
        for method, path in (("POST", "api/latents"), ("GET", "data/index.js")):
            content = {"text": "x"} if method == "POST" else None
            status, _, body = send(address, method, path, content, JSON | headers)
            assert refusal(status, body) == (403, "another site asks; open the address itself")
    assert not model.asked
    for headers in ({"Origin": f"http://{host}", "Sec-Fetch-Site": "same-origin"}, {"Sec-Fetch-Site": "none"}):
        assert post(address, "api/latents", {"text": "x"}, JSON | headers)[0] == 200


def test_a_link_may_be_followed_from_another_site_but_not_framed(address):
    link = {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate", "Sec-Fetch-Dest": "document"}
    assert send(address, headers=link)[0] == 200
    assert send(address, headers=link | {"Sec-Fetch-Dest": "iframe"})[0] == 403
    assert post(address, "api/latents", {"text": "x"}, JSON | link)[0] == 403


@pytest.mark.parametrize(
    "path",
    [
        *("../secret", "../../../../../../etc/passwd", "data/../../secret", "%2e%2e/secret", "%2e%2e%2fsecret"),
        *("..%5csecret", "/etc/passwd", "//etc/passwd", "link", "data", "x%00", "a" * 5000, "explore.py"),
    ],
)
def test_a_path_leads_to_no_other_file(address, path):
    status, _, body = send(address, path=path)
    assert status in (403, 404)
    refusal(status, body)


def test_what_is_too_large_is_refused_however_it_is_sent(address, model):
    large = json.dumps({"text": "a" * guard.MAX_BYTES}).encode()
    assert refusal(*post(address, "api/latents", large)) == (413, guard.TOO_LONG)
    chunked = b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in (large[:40_000], large[40_000:])) + b"0\r\n\r\n"
    headers = JSON | {"Transfer-Encoding": "chunked"}
    assert refusal(*post(address, "api/latents", chunked, headers)) == (413, guard.TOO_LONG)
    assert not model.asked
    assert post(address, "api/latents", {"text": "a" * (guard.MAX_BYTES - 20)})[0] == 200


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "cannot be read"),
        (b"{", "cannot be read"),
        (b"\xff", "cannot be read"),
        (b'{"text": NaN}', "cannot be read"),
        (b'{"text": 1}', "Expected `str`, got `int` - at `$.text`"),
        (b'{"text": "a", "more": 1}', "unknown field `more`"),
        (b"[" * 60_000, "cannot be read"),
        ({"text": "wrong"}, "that is wrong; say another"),
    ],
)
def test_what_cannot_be_asked_is_one_line(address, content, message):
    status, said = refusal(*post(address, "api/latents", content))
    assert status == 400
    assert message in said


def test_only_json_is_taken_and_only_by_post(address):
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x"):
        assert refusal(*post(address, "api/latents", {"text": "x"}, {"Content-Type": kind}))[0] == 415
    assert refusal(*post(address, "api/latents", {"text": "x"}, {}))[0] == 415
    for method, path in (
        ("GET", "api/latents"),
        ("PUT", "api/latents"),
        ("POST", "api/about"),
        ("DELETE", "data/index.js"),
    ):
        assert send(address, method, path, {"text": "x"}, JSON)[0] in (404, 405)


def test_a_bug_is_one_line_too_and_the_server_goes_on(address, caplog):
    assert refusal(*post(address, "api/latents", {"text": "bug"})) == (500, "this failed: a bug")
    assert post(address, "api/latents", {"text": "x"})[0] == 200
    assert "RuntimeError: a bug" in caplog.text  # for whoever looks for it


def test_without_a_model_the_pages_are_there_and_it_is_said_why(folder):
    with serving(folder, "t", "about", None, "the model is not there") as (address, _):
        assert send(address)[0] == 200
        assert json.loads(send(address, path="api/about")[2]) == {"noModel": "the model is not there"}
        for path, content in (("api/latents", {"text": "x"}), ("api/steer", STEER)):
            assert refusal(*post(address, path, content)) == (409, "the model is not there")


# ---- several readers


def test_two_readers_at_once(address, model):
    """The second has its latents long before the text of the first is written."""
    finished = []

    def read():
        _, body = post(address, "api/steer", STEER | {"n_tokens": 60})
        finished.append(body)

    first = threading.Thread(target=read)
    first.start()
    while not model.n_written:
        time.sleep(0.01)
    for number in range(5):
        assert post(address, "api/latents", {"text": str(number)}) == (200, b'{"tokens": ["%d"]}' % number)
    assert not finished
    first.join(30)
    events = [json.loads(line) for line in finished[0].splitlines()]
    for side in ("unsteered", "steered"):
        text = "".join(event["text"] for event in events if event["side"] == side)
        assert text == "".join(f"{side}{number} " for number in range(60))


def begin(address, path, content):
    """A connection on which something is asked, whose answer nobody has read yet."""
    place = urlsplit(address)
    connection = http.client.HTTPConnection(place.netloc, timeout=30)
    connection.request("POST", place.path + path, json.dumps(content), JSON)
    return connection


def until(condition, seconds=10.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_what_nobody_waits_for_any_more_is_not_begun(address, model):
    holding = begin(address, "api/latents", {"text": "hold"})
    assert model.begun.wait(10)
    for number in range(3):
        begin(address, "api/latents", {"text": f"left {number}"}).close()
    last = begin(address, "api/latents", {"text": "last"})
    time.sleep(0.5)  # the server sees who has gone
    model.held.set()
    assert last.getresponse().read() == b'{"tokens": ["last"]}'
    assert holding.getresponse().status == 200
    assert model.asked == ["hold", "last"]


def test_a_reader_who_goes_ends_the_writing(address, model):
    connection = begin(address, "api/steer", STEER | {"n_tokens": 10_000})
    answer = connection.getresponse()
    answer.readline()
    answer.close()
    connection.close()
    time.sleep(0.5)
    n_written = model.n_written
    time.sleep(0.3)
    assert model.n_written == n_written < 200


def test_an_error_while_writing_is_a_line_of_that_side(address):
    _, body = post(address, "api/steer", STEER | {"n_tokens": 9, "seed": 1})
    events = [json.loads(line) for line in body.splitlines()]
    assert events[-2:] == [{"side": side, "error": "no numbers"} for side in ("unsteered", "steered")]


def test_it_ends_while_text_is_written(folder, model):
    began = time.monotonic()
    with serving(folder, "t", "about", model) as (address, thread):
        connection = begin(address, "api/steer", STEER | {"n_tokens": 10_000})
        connection.getresponse().readline()
    assert not thread.is_alive()
    assert time.monotonic() - began < 20
    with pytest.raises(OSError, match="refused"):
        send(address)


# ---- which site


def test_the_dashboard_of_another_dictionary_is_refused(tmp_path):
    site = test_dashboard.write(tmp_path / "site")
    (index,) = test_dashboard.read(site, "index")
    (site / "data" / "index.js").write_text(f"saeDashboard.index({json.dumps(index | {'digest': 'a'})});")
    explore.refuse_another(site, "a")
    with pytest.raises(UsageError, match="is the dashboard of another dictionary; choose another folder"):
        explore.refuse_another(site, "b")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda site: (site / "site.js").write_text("// older"),
            "was written by another version of sae_jax; remove it",
        ),
        (lambda site: (site / "table.js").unlink(), "lacks files, or is damaged; remove it"),
        (lambda site: (site / "data" / "index.js").write_text("saeDashboard.index({"), "lacks files, or is damaged"),
        (lambda site: (site / "index.html").write_text("my thesis"), "is not a dashboard"),
    ],
)
def test_what_cannot_be_served_is_refused_and_left_alone(tmp_path, damage, message):
    site = test_dashboard.write(tmp_path / "site")
    damage(site)
    with pytest.raises(UsageError, match=message):
        explore.refuse_another(site, "a")
    with contextlib.suppress(FileNotFoundError):
        assert (site / "site.js").exists()
