// The page of one latent.
"use strict";

const latentLinks = []; // what other scripts put at the head of a latent's page: functions of its number

async function showLatent(view) {
  const { latent } = view;
  document.title = `Latent ${latent} – ${index.title}`;
  const row = rowOf(latent);
  if (row === undefined) {
    showNothing(`Latent ${latent}`, noPage(latent));
    return;
  }
  const record = await fromBlock(latentBlocks, "latents", row, index.latentsPerFile);
  const around = view.embed ? null : await neighbours(view);
  if (route().latent !== latent) return; // the reader has gone on meanwhile
  const most = index.max[row];
  const alive = record.count > 0;
  main.replaceChildren(
    around ? latentHead(view, around) : embedHead(latent),
    record.label
      ? h("p.label", { dir: "auto" }, visibleText(record.label[0]), " ", h("small", null, visibleText(record.label[1])))
      : "",
    factList(latentFacts(record, row)),
    h("details", null, h("summary", null, "What these numbers mean"), meanings(latentFacts(record, row))),
    h("div.cards", null, ...cards(view, record, most), around ? shelfCard(latent) : null),
    record.sources ? sourcesTable(record) : "",
    ...(alive
      ? contexts(record, most)
      : [h("p.empty", null, `Silent on all ${COUNT.format(index.nRows)} tokens of the sample.`)]),
  );
}

function latentHead(view, [previous, next]) {
  const { latent } = view;
  const step = (to, name, rel) =>
    to === null ? h("span.off", null, name) : h("a", { href: address({ ...view, latent: to }), rel }, name);
  const listed = view.q || view.only || Object.keys(view.ranges).length;
  return h(
    "div.above.latent",
    null,
    h("h1", { tabindex: "-1" }, `Latent ${latent}`),
    h("button.link.narrow", { type: "button", onclick: showContexts }, "Contexts ↓"),
    h(
      "nav",
      { "aria-label": "Latents" },
      ...latentLinks.map((link) => link(latent)),
      h("a", { href: address({ latent: null, q: `~${latent}`, sort: "likeness", dir: "asc" }) }, "Similar"),
      index.other ? h("a", { href: `#/compare?latent=${latent}` }, "Compare") : null,
      h("button.link", { type: "button", title: "A latent at random (r)", onclick: goAnywhere }, "Random"),
      step(previous, "← Previous", "prev"),
      h("a", { href: address({ ...view, latent: null }) }, listed ? "Back to the list" : "All latents"),
      step(next, "Next →", "next"),
    ),
  );
}

// On a narrow screen they are far below.
function showContexts() {
  const contexts = main.querySelector(".contexts");
  contexts?.scrollIntoView({ block: "center" });
  contexts?.querySelector("button").focus({ preventScroll: true });
}

function embedHead(latent) {
  const whole = `#/latent/${latent}`;
  return h(
    "div.above.latent",
    null,
    h("h1", { tabindex: "-1" }, `Latent ${latent} `, h("small", null, index.title)),
    h(
      "nav",
      { "aria-label": "Latents" },
      h("a", { href: whole, target: "_blank", rel: "noopener" }, "Open in the dashboard"),
    ),
  );
}

function latentFacts(record, row) {
  const alive = record.count > 0;
  return [
    [
      "density",
      alive ? index.density[row] : "silent",
      `Share of the sampled tokens on which it is active: ${COUNT.format(record.count)} of ${COUNT.format(index.nRows)}`,
    ],
    ["activations", record.count, `Sampled tokens, of ${COUNT.format(index.nRows)}, on which it is active`],
    ["mean when active", record.mean, "Mean of its values where it is active"],
    ["max", index.max[row], "Largest value in the sample"],
    [index.scoreName, index.score[row], scoreMeaning()],
    [
      "decoder norm",
      record.norm,
      index.sources.length > 1 ? "Length of its decoder row to the last source" : "Length of its decoder row",
    ],
  ];
}

function cards(view, record, most) {
  const of = `${COUNT.format(record.count)} tokens`;
  return [
    record.count ? activationsCard(view.latent, record, most) : null,
    record.up ? logitTable("Promoted tokens", record.up) : null,
    record.down ? logitTable("Suppressed tokens", record.down) : null,
    record.near === undefined ? notMade("Nearest decoder rows (cosine)") : null,
    record.near?.length
      ? othersTable(
          view,
          "Nearest decoder rows (cosine)",
          record.near.map(([other, cosine]) => [other, cosine.toFixed(3), ""]),
        )
      : null,
    record.coactive === undefined && record.count ? notMade(`Active on the same ${of}`) : null,
    record.coactive?.length
      ? othersTable(
          view,
          `Active on the same ${of}`,
          record.coactive.map(([other, both, jaccard]) => [
            other,
            percent(both / record.count),
            `On ${COUNT.format(both)} of its ${of}; Jaccard index ${jaccard.toFixed(3)}`,
          ]),
        )
      : null,
  ];
}

// A card of what was too much work for a dictionary or a sample of this size.
function notMade(title) {
  return h("figure", null, h("figcaption", null, title), h("p.soft", null, "Left out: too many to compare."));
}

function activationsCard(latent, record, most) {
  const edges = record.histogram.map((_, i) => (i * most) / record.histogram.length).concat(most);
  const ticks = [0, most / 2, most].map((value) => [value, number(value)]);
  const strongest = record.tokens.reduce((n, [, times]) => n + times, 0);
  return h(
    "figure",
    null,
    h("figcaption", null, "Activations"),
    histogram(record.histogram, edges, `Histogram of the activations of latent ${latent}`, 360, ticks),
    h(
      "p.fires",
      null,
      `Strongest ${strongest} on `,
      ...record.tokens.slice(0, 6).flatMap(([id, times]) => [chip(id, h("small", null, ` ×${times}`)), " "]),
    ),
    record.patterns
      ? h(
          "p.fires",
          null,
          h("span", { title: PATTERNS }, "Patterns (N2G) "),
          ...(record.patterns.length
            ? record.patterns.flatMap(pattern)
            : ["none: it needs more text than a pattern holds"]),
        )
      : null,
  );
}

const PATTERNS =
  "The shortest endings of its strongest contexts on which it keeps half of its value; * stands for any token, and ×n for " +
  "so many contexts (Neuron to Graph)";

// [tokens, -1 for any; how many contexts have it].
function pattern([ids, times]) {
  const parts = ids.map((id) => (id < 0 ? h("span.any", { title: "any token" }, "*") : token(id)));
  return [h("span.chip", null, ...parts, h("small", null, ` ×${times}`)), " "];
}

function logitTable(title, pairs) {
  const most = Math.max(...pairs.map(([, value]) => Math.abs(value)));
  const row = ([id, value]) =>
    h("tr", null, h("td", null, chip(id)), h("td.number", null, signed(value), bar(Math.abs(value), 0, most)));
  return h("table.logits", null, h("caption", null, title), h("tbody", null, ...pairs.map(row)));
}

// Other latents: [number, what is said of it, and more of it].
function othersTable(view, title, others) {
  const line = ([latent, said, more]) => {
    const row = rowOf(latent);
    const shown = row !== undefined;
    const label = labels.get(latent);
    return h(
      shown && index.density[row] ? "tr" : "tr.silent",
      null,
      h("td", null, shown ? h("a", { href: address({ ...view, latent }) }, String(latent)) : String(latent)),
      h("td.number", more ? { title: more } : null, said),
      label
        ? h("td.said", { dir: "auto", title: visibleText(label) }, visibleText(label))
        : h("td.chips", null, ...chips(shown ? idsAt(index.topTokens, row).slice(0, 2) : [])),
    );
  };
  return h("table.near", null, h("caption", null, title), h("tbody", null, ...others.map(line)));
}

// What a latent is to each of several sources, side by side.
const SHARE = "Of the lengths of its decoder rows to all sources, as the dictionary was trained, the share of this one";

function sourcesTable(record) {
  const head = (name, meaning, cells) =>
    h("tr", null, h("th", { scope: "row", ...(meaning ? { title: meaning } : {}) }, name), ...cells);
  const list = (pairs) => h("td.chips", null, ...(pairs || []).flatMap(([id]) => [chip(id), " "]));
  const rows = [
    head(
      "decoder norm",
      "Length of its decoder row to this source",
      record.sources.map(({ norm }) => h("td", null, number(norm))),
    ),
    head(
      "share",
      SHARE,
      record.sources.map(({ share }) => h("td", null, percent(share), bar(share, 0, 1))),
    ),
  ];
  if (record.sources.some(({ up }) => up)) {
    rows.push(
      head(
        "promoted",
        null,
        record.sources.map(({ up }) => list(up)),
      ),
    );
    rows.push(
      head(
        "suppressed",
        null,
        record.sources.map(({ down }) => list(down)),
      ),
    );
  }
  return h(
    "div.scroll.sources",
    { "tabindex": "0", "role": "group", "aria-label": "Sources" },
    h(
      "table.plain",
      null,
      h("caption", null, "Sources"),
      h("thead", null, h("tr", null, h("td"), ...index.sources.map((name) => h("th", { scope: "col" }, name)))),
      h("tbody", null, ...rows),
    ),
  );
}
