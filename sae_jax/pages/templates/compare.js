// #/compare: the latents by how well another dictionary has them too, those without a counterpart first;
// #/compare?latent=12: one, and beside it in a frame its counterpart on the pages of the other dictionary.
"use strict";

// A cell of the table: how like the counterpart is, and which it is.
function matchCell(name, latent) {
  const other = matches[name]?.latents[latent] ?? -1;
  if (other < 0) return ["none"];
  const value = matches[name].values[latent];
  return [
    value.toFixed(3),
    bar(value, 0, 1),
    h("a.counterpart", { href: `${index.other.href}#/latent/${other}` }, `→ ${other}`),
  ];
}

async function showCompare(given) {
  await script("matches.js");
  if (given.has("latent")) return showPair(given);
  const view = route();
  const by = Object.keys(MATCHES).find((name) => matches[name]);
  if (!given.has("sort") && by) Object.assign(view, { sort: by, dir: "asc" });
  const head = h(
    "div",
    null,
    h("h1", null, "Beside ", h("a", { href: index.other.href }, index.other.title)),
    h(
      "p.soft",
      null,
      by
        ? "Each latent with the most alike of the other. Those without a counterpart come first; follow a number to see both."
        : "Their decoder rows have other widths, and their samples are of other texts: nothing can be matched.",
    ),
  );
  await showTable(view, head);
}

function showPair(given) {
  const latent = Number(given.get("latent"));
  if (rowOf(latent) === undefined) {
    showNothing("Compare", noPage(latent));
    return;
  }
  document.title = `Latent ${latent} beside ${index.other.title} – ${index.title}`;
  const found = Object.keys(MATCHES).map((name) => [
    name,
    matches[name]?.latents[latent] ?? -1,
    matches[name]?.values[latent],
  ]);
  const asked = /^\d+$/.test(given.get("with") ?? "") ? Number(given.get("with")) : null;
  const other = asked ?? found.map(([, number]) => number).find((number) => number >= 0) ?? null;
  const choice = found
    .filter(([, number]) => number >= 0)
    .map(([name, number, value]) =>
      h(
        "a",
        { href: `#/compare?latent=${latent}&with=${number}`, ...(number === other ? { "aria-current": "true" } : {}) },
        `${number}, ${name === "cosine" ? "cosine" : "Jaccard"} ${value.toFixed(3)}`,
      ),
    );
  const pane = (title, source) => h("section.pane", null, h("h2", null, title), source);
  const frame = (href, title) => h("iframe", { src: href, title, loading: "eager" });
  main.replaceChildren(
    h(
      "div.above",
      null,
      h("h1", { tabindex: "-1" }, `Latent ${latent} beside ${index.other.title}`),
      h("nav", { "aria-label": "Counterparts" }, h("a", { href: "#/compare" }, "All latents"), ...choice),
    ),
    h(
      "div.panes",
      null,
      pane(index.title, frame(`${here()}#/embed/${latent}`, `Latent ${latent} of ${index.title}`)),
      pane(
        index.other.title,
        other === null
          ? h("p.empty", null, "Nothing of the other dictionary is like it: it fires where none of the others does.")
          : frame(`${index.other.href}#/embed/${other}`, `Latent ${other} of ${index.other.title}`),
      ),
    ),
  );
  say(other === null ? "It has no counterpart." : `Latent ${latent} beside latent ${other}.`);
}

function here() {
  return location.href.replace(/#.*/s, "");
}

// The page in a frame tells how tall it is, so that both are read with one scroll bar.
window.addEventListener("message", ({ source, data }) => {
  const frame = Array.from(document.querySelectorAll("iframe")).find(({ contentWindow }) => contentWindow === source);
  if (frame && Number.isFinite(data?.saeHeight))
    frame.style.height = `${Math.min(20000, Math.max(200, data.saeHeight))}px`;
});

function tellHeight() {
  if (parent !== window) parent.postMessage({ saeHeight: document.documentElement.scrollHeight }, "*");
}
