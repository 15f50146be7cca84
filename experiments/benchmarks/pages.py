"""How soon can a reader use a dashboard, how long does a latent take, and how much memory does the page need?

Opens sites that `sae-jax dashboard` wrote from the file system, in headless browsers that are installed, and measures
inside the page: from the start of navigation until the table of latents is painted; from a change of the address until
the page of a latent is, for latents spread over the whole dictionary, none of which was loaded before; the same
for sorting and searching the table. The memory is that of the process that holds the page.

    python experiments/benchmarks/pages.py SITE... --out pages.json
    python experiments/benchmarks/pages.py --smoke

Answer: RESULTS.md.
"""

from __future__ import annotations

import http.server
import json
import queue
import shutil
import subprocess
import tempfile
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import common
import numpy as np
import tyro

from sae_jax.analysis import examples
from sae_jax.pages.dashboard import Site, write_dashboard
from sae_jax.pages.latents import Subject

CHROMIUM = "--headless --no-sandbox --disable-gpu --no-first-run --disable-background-networking --disable-sync"
BROWSERS = {
    "chromium": lambda profile, url: ["chromium", *CHROMIUM.split(), f"--user-data-dir={profile}", url],
    "firefox": lambda profile, url: ["firefox", "--headless", "--no-remote", "--profile", profile, url],
}
N_LATENTS = 20  # that are opened
SECONDS = 120  # for one site
MEASURE = """
const errors = [];
addEventListener("error", (event) => errors.push(event.message || String(event.target.src)));
const seen = (test) => new Promise((resolve) => {
  const painted = () => requestAnimationFrame(() => setTimeout(() => resolve(performance.now())));
  const look = () => (test() ? painted() : setTimeout(look, 1));
  look();
});
const change = async (address, test) => {
  const start = performance.now();
  location.hash = address;
  return (await seen(test)) - start;
};
addEventListener("DOMContentLoaded", async () => {
  const rows = () => document.querySelectorAll("table.latents tbody tr").length;
  const result = { interactive: await seen(rows), latents: [] };
  const shown = await list({ ...route(), q: "" });
  const step = shown.length / N_LATENTS;
  await new Promise((resolve) => setTimeout(resolve, PAUSE));
  for (let i = 0; i < Math.min(N_LATENTS, shown.length); i++) {
    const latent = latentOf(shown[Math.floor(i * step)]);
    const heading = () => document.querySelector("main h1")?.textContent === `Latent ${latent}`;
    result.latents.push(await change(`#/latent/${latent}`, heading));
  }
  result.sorted = await change("#/?sort=max", rows);
  const status = () => document.querySelector("[role=status]")?.textContent.includes("for");
  result.searched = await change("#/?q=e", status);
  await new Promise((resolve) => setTimeout(resolve, 500));
  fetch("REPORT", { method: "POST", mode: "no-cors", body: JSON.stringify({ ...result, errors }) });
});
"""


@dataclass(frozen=True)
class Benchmark:
    """What is opened."""

    sites: tyro.conf.Positional[tuple[Path, ...]] = ()
    """folders that `sae-jax dashboard` wrote"""
    browsers: tuple[str, ...] = tuple(BROWSERS)
    """of chromium and firefox; those that are not installed are left out"""
    smoke: bool = False
    """a made-up site of 300 latents"""
    pause: float = 0.0
    """seconds between the table and the first latent: a browser that has just started is busy for one more"""
    out: Path | None = None
    """write the numbers as JSON"""


def main(settings: Benchmark) -> None:
    """Open, measure, tell."""
    with tempfile.TemporaryDirectory() as folder:
        sites = settings.sites or ((smoke_site(Path(folder) / "site"),) if settings.smoke else ())
        browsers = [name for name in settings.browsers if shutil.which(name)]
        pairs = [(site, browser) for site in sites for browser in browsers]
        measured = [(site, browser, measure(site.resolve(), browser, settings.pause)) for site, browser in pairs]
    rows = [[site.name, browser, *told(result)] for site, browser, result in measured]
    columns = ["site", "browser", "table after s", "a latent s", "slowest", "sorting s", "searching s", "MB", "errors"]
    record = {"rows": [{"site": site.name, "browser": name, **result} for site, name, result in measured]}
    common.report(common.table("pages from the file system", columns, rows), record, settings.out)


def told(result: dict[str, Any]) -> list[str]:
    """Cells of a row; the page counts milliseconds."""
    latents = np.array(result["latents"]) / 1000
    times = [result["interactive"] / 1000, np.median(latents), latents.max(), *(result[n] / 1000 for n in TABLE)]
    return [*(f"{t:.3f}" for t in times), f"{result['bytes'] / 1e6:.0f}", "; ".join(result["errors"]) or "none"]


TABLE = ("sorted", "searched")


def measure(site: Path, browser: str, pause: float) -> dict[str, Any]:
    """What a browser reports of a site."""
    reports: queue.Queue[dict[str, Any]] = queue.Queue()

    class Listener(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            reports.put(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(204)
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Listener)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    script = MEASURE.replace("REPORT", f"http://127.0.0.1:{server.server_port}/").replace("N_LATENTS", str(N_LATENTS))
    script = script.replace("PAUSE", str(1000 * pause))
    page = site / "measured.html"
    html = (site / "index.html").read_text("utf-8")
    page.write_text(html.replace("</head>", f"<script>{script}</script></head>"), "utf-8")
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        process = subprocess.Popen(
            BROWSERS[browser](profile, page.as_uri()), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        try:
            result = reports.get(timeout=SECONDS)
            return result | {"bytes": largest_of_family(process.pid)}
        finally:
            process.terminate()
            process.wait()
            page.unlink()
            server.shutdown()
            server.server_close()


def largest_of_family(pid: int) -> int:
    """Bytes in memory (shared ones in part) of the largest process under this one: that of the page."""
    parents = {}
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = status.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        parents[int(status.parent.name)] = int(fields[1])
    family = {pid}
    while more := {child for child, parent in parents.items() if parent in family} - family:
        family |= more
    sizes = [0]
    for member in family:
        try:
            lines = Path(f"/proc/{member}/smaps_rollup").read_text().splitlines()
        except OSError:
            continue
        sizes += [1024 * int(line.split()[1]) for line in lines if line.startswith("Pss:")]
    return max(sizes)


def smoke_site(folder: Path) -> Path:
    """A site of latents that fire on one token each."""
    rng = np.random.default_rng(0)
    sequences = rng.integers(0, 50, (20, 64)).astype(np.int32)
    places = np.arange(sequences.size)
    block = sequences.reshape(-1, 1), np.ones((sequences.size, 1), np.float32), places
    table = examples.collect([block], 300, sequences)
    subject = Subject(table, rng.standard_normal((300, 8)).astype(np.float32), 50)
    tokens = [f"token {i}" for i in range(50)]
    write_dashboard(folder, Site(subject, tokens, "smoke", "made up", [], {}))
    return folder


if __name__ == "__main__":
    main(tyro.cli(Benchmark, description=__doc__))
