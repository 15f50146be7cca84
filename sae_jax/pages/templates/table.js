// The table of all latents, with the summary above it.
"use strict";

const ROWS_PER_PAGE = 100;

function list(view) {
  const key = JSON.stringify([view.q, view.sort, view.dir, view.silent]);
  if (listed.key === key) return listed.rows;
  const wanted = view.q.toLowerCase();
  const asNumber = /^\s*#?(\d+)\s*$/.exec(view.q);
  const exact = asNumber ? Number(asNumber[1]) : -1;
  const matches = new Uint8Array(searchable.length);
  searchable.forEach((text, id) => {
    matches[id] = text.includes(wanted);
  });
  const found = (ids, row) => {
    for (let i = row * CHIPS; i < row * CHIPS + CHIPS; i++) if (matches[ids[i]]) return true;
    return false;
  };
  const rows = new Uint32Array(index.nShown);
  let n = 0;
  for (let row = 0; row < index.nShown; row++) {
    const match = !wanted || found(index.topTokens, row) || found(index.topLogits, row);
    if ((match && (view.silent || index.density[row] > 0)) || latentOf(row) === exact) rows[n++] = row;
  }
  const column = { density: index.density, max: index.max, [index.scoreName]: index.score }[view.sort];
  listed = { key, rows: sorted(rows.subarray(0, n), column, view.dir === "asc") };
  return listed.rows;
}

// Rows in the order of a column (none: of their number), ties in order of number. A million rows take a tenth of a
// second this way, since numbers are compared in place of calls: the high half of a key is the value, made an integer
// that orders alike, the low half is the row.
function sorted(rows, column, rising) {
  if (!column) return rising ? rows : rows.reverse();
  const keys = new BigUint64Array(rows.length);
  const halves = new Uint32Array(keys.buffer);
  const value = new Float32Array(1);
  const bits = new Uint32Array(value.buffer);
  for (let i = 0; i < rows.length; i++) {
    value[0] = column[rows[i]];
    const order = bits[0] >>> 31 ? ~bits[0] : bits[0] | 0x80000000;
    halves[2 * i] = rows[i];
    halves[2 * i + 1] = rising ? order : ~order;
  }
  keys.sort();
  return Uint32Array.from(rows, (_, i) => halves[2 * i]);
}

function configRows(value, name) {
  if (value === null || typeof value !== "object")
    return [h("tr", null, h("th", { scope: "row" }, name), h("td", null, String(value)))];
  return Object.entries(value).flatMap(([key, item]) => configRows(item, name ? `${name}.${key}` : key));
}

// What these pages are made of: [name, value, what it means], as the metrics.
function sample() {
  const nShown = index.nShown;
  const silentShare = ((100 * index.nSilent) / index.nLatents).toFixed(1);
  const all = nShown === index.nLatents;
  return [
    [
      "latents",
      all ? nShown : `${COUNT.format(nShown)} of ${COUNT.format(index.nLatents)}`,
      all ? "all have a page" : "those that have a page",
    ],
    ["tokens sampled", index.nRows, "tokens of the training text that examples, densities and maxima come from"],
    [
      "silent in the sample",
      `${COUNT.format(index.nSilent)} (${silentShare} %)`,
      `latents that are active on none of these ${COUNT.format(index.nRows)} tokens. Dead latents are counted in ` +
        "training and silent ones in the evaluation, each over other tokens, so the three numbers differ",
    ],
  ];
}

function factList(facts) {
  return h(
    "dl.facts",
    null,
    ...facts.map(([name, value, meaning]) =>
      h("div", null, h("dt", meaning ? { title: meaning } : null, name), h("dd", null, number(value))),
    ),
  );
}

function meanings(facts) {
  return h(
    "dl.meanings",
    null,
    ...facts.flatMap(([name, , meaning]) => (meaning ? [h("dt", null, name), h("dd", null, meaning)] : [])),
  );
}

function summary() {
  const groups = [["These pages", sample()]];
  if (index.metrics.length) groups.push(["Evaluation", index.metrics]);
  const { counts, edges } = index.densityHistogram;
  const ticks = [];
  for (let power = Math.ceil(edges[0]); power <= 0; power++) ticks.push([power, power ? `1e${power}` : "1"]);
  const config = configRows(index.config, "");
  return h(
    "section.summary",
    { "aria-label": "Summary" },
    h(
      "div",
      null,
      ...groups.flatMap(([title, facts]) => [h("h2", null, title), factList(facts)]),
      h("details", null, h("summary", null, "What these numbers mean"), meanings(groups.flatMap(([, facts]) => facts))),
      config.length
        ? h(
            "details",
            null,
            h("summary", null, "Configuration"),
            h("table", null, h("tbody", null, ...config)),
          )
        : null,
    ),
    h(
      "figure",
      null,
      h("figcaption", null, "How often latents fire (share of tokens)"),
      histogram(counts, edges, "Histogram of log10 firing rate", 360, ticks),
    ),
  );
}

function bar(value, from, to) {
  const share = Math.min(1, Math.max(0, (value - from) / (to - from || 1)));
  return h("span.bar", { "aria-hidden": "true", "--share": share.toFixed(3) });
}

function chips(ids) {
  return ids.map((id) => chip(id));
}

function table(view, shown) {
  const columns = [
    ["latent", "Latent", "Number of the latent"],
    ["density", "Density", "Share of tokens on which the latent is active"],
    [index.scoreName, index.scoreName === "effect" ? "Effect" : "Energy", scoreMeaning()],
    ["max", "Max", "Largest activation in the sample"],
  ];
  const heads = columns.map(([sort, name, meaning]) => {
    const current = view.sort === sort;
    const dir = current ? (view.dir === "asc" ? "desc" : "asc") : natural(sort);
    const arrow = current ? (view.dir === "asc" ? " ↑" : " ↓") : "";
    const sorted = current ? { "aria-sort": view.dir === "asc" ? "ascending" : "descending" } : {};
    return h(
      "th.number",
      { scope: "col", ...sorted },
      h("a", { href: address({ ...view, sort, dir, page: 1 }), title: meaning }, name + arrow),
    );
  });
  const lowest = index.densityHistogram.edges[0];
  const highest = index.score.reduce((a, b) => Math.max(a, b), 0);
  const rows = Array.from(shown, (row) => {
    const latent = latentOf(row);
    const density = index.density[row];
    return h(
      density ? "tr" : "tr.silent",
      null,
      h("td.number", null, h("a", { href: address({ ...view, latent }) }, String(latent))),
      h(
        "td.number",
        null,
        density ? number(density) : "silent",
        bar(density ? Math.log10(density) : lowest, lowest, 0),
      ),
      h("td.number", null, number(index.score[row]), bar(index.score[row], 0, highest)),
      h("td.number", null, number(index.max[row])),
      h("td.chips", { "data-label": "fires on" }, ...chips(idsAt(index.topTokens, row))),
      h("td.chips", { "data-label": "promotes" }, ...chips(idsAt(index.topLogits, row))),
    );
  });
  const hasLogits = index.scoreName === "effect";
  return h(
    "div.scroll",
    null,
    h(
      hasLogits ? "table.latents" : "table.latents.nologits",
      null,
      h(
        "thead",
        null,
        h(
          "tr",
          null,
          ...heads,
          h(
            "th",
            { scope: "col", title: "Tokens under the 25 strongest activations, commonest first" },
            "Fires on",
          ),
          h("th", { scope: "col", title: "Tokens whose logits rise most" }, "Promotes"),
        ),
      ),
      h("tbody", null, ...rows),
    ),
  );
}

function scoreMeaning() {
  return index.scoreName === "effect"
    ? "Root mean square over the vocabulary of the centred logit effect, at the mean active value"
    : "Mean over all tokens of (activation × decoder norm)²";
}

function pager(view, nPages) {
  const to = (page, name) =>
    page < 1 || page > nPages
      ? h("span.off", null, name)
      : h("a", { href: address({ ...view, page }) }, name);
  return h(
    "nav.pager",
    { "aria-label": "Pages" },
    to(view.page - 1, "← Previous"),
    `page ${view.page} of ${nPages}`,
    to(view.page + 1, "Next →"),
  );
}

function nothingFound(view) {
  const range = `latents have numbers from 0 to ${index.nLatents - 1}`;
  const [, asNumber] = /^\s*#?(\d+)\s*$/.exec(view.q) || [];
  if (asNumber === undefined) return `No latent fires on, or promotes, such a token. To find one by number: ${range}.`;
  return Number(asNumber) < index.nLatents ? noPage(Number(asNumber)) : `There is no latent ${asNumber}: ${range}.`;
}

function noPage(latent) {
  if (latent >= index.nLatents)
    return `There is no latent ${latent}: latents have numbers from 0 to ${index.nLatents - 1}.`;
  return `Latent ${latent} has no page: these are of ${COUNT.format(index.nShown)} of ${COUNT.format(index.nLatents)} latents.`;
}

function showTable(view) {
  document.title = index.title;
  const rows = list(view);
  const nPages = Math.max(1, Math.ceil(rows.length / ROWS_PER_PAGE));
  const current = { ...view, page: Math.min(view.page, nPages) };
  const part = rows.slice((current.page - 1) * ROWS_PER_PAGE, current.page * ROWS_PER_PAGE);
  main.replaceChildren(
    view.q ? "" : summary(),
    h(
      "div.above",
      null,
      h(
        "p",
        { role: "status" },
        `${COUNT.format(rows.length)} latent${rows.length === 1 ? "" : "s"}`,
        ...(view.q ? [" for “", ...visible(view.q), "”"] : []),
      ),
      h(
        "a",
        { href: address({ ...current, silent: !view.silent, page: 1 }) },
        view.silent ? "Hide silent latents" : "Show silent latents",
      ),
      pager(current, nPages),
    ),
    table(current, part),
    rows.length
      ? pager(current, nPages)
      : h("p.empty", { role: "alert" }, nothingFound(view)),
  );
}
