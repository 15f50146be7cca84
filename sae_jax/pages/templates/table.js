// The table of latents.
"use strict";

const ROWS_PER_PAGE = 100;

function bar(value, from, to) {
  const share = Math.min(1, Math.max(0, (value - from) / (to - from || 1)));
  return h("span.bar", { "aria-hidden": "true", "--share": share.toFixed(3) });
}

function chips(ids) {
  return ids.map((id) => chip(id));
}

// The cells of a row that hold numbers of it, by the name of the quantity.
const CELLS = {
  density: (row) => {
    const lowest = index.densityHistogram.edges[0];
    const density = index.density[row];
    return [density ? figures(density) : "silent", bar(density ? Math.log10(density) : lowest, lowest, 0)];
  },
  score: (row) => [figures(index.score[row]), bar(index.score[row], 0, index.mostScore)],
  max: (row) => [figures(index.max[row])],
  share: (value) => [percent(value), bar(value, 0, 1)],
};

function cellOf(name, row) {
  if (name in MATCHES) return matchCell(name, latentOf(row));
  if (name.startsWith("share")) return CELLS.share(quantities()[name].column()[row]);
  return CELLS[name === index.scoreName ? "score" : name](row);
}

function table(view, shown) {
  const near = likeWhat(view.q) === null ? null : listed.near;
  const names = Object.keys(quantities()).filter((name) =>
    view.name === "compare" ? name in MATCHES || name === "density" || name === index.scoreName : !(name in MATCHES),
  );
  const head = (sort, name, meaning) => {
    const current = view.sort === sort;
    const dir = current ? (view.dir === "asc" ? "desc" : "asc") : natural(sort);
    const arrow = current ? (view.dir === "asc" ? " ↑" : " ↓") : "";
    const sorted = current ? { "aria-sort": view.dir === "asc" ? "ascending" : "descending" } : {};
    return h(
      sort === "likeness" ? "th" : sort in MATCHES ? "th.number.match" : "th.number",
      { scope: "col", ...sorted },
      h("a", { href: address({ ...view, sort, dir, page: 1 }), title: meaning }, name + arrow),
    );
  };
  const heads = [
    head("latent", "Latent", "Number of the latent"),
    ...names.map((name) => head(name, quantities()[name].title, quantities()[name].meaning)),
    near
      ? head("likeness", "Likeness", "Nearest decoder rows first, then those that are active on the same tokens")
      : null,
  ];
  const labelled = Array.from(shown).some((row) => labels.has(latentOf(row)) || shelf.notes.has(latentOf(row)));
  const to = (latent) => (view.name === "compare" ? `#/compare?latent=${latent}` : address({ ...view, latent }));
  const rows = Array.from(shown, (row) => {
    const latent = latentOf(row);
    return h(
      index.density[row] ? "tr" : "tr.silent",
      null,
      h("td.number", null, h("a", { href: to(latent) }, String(latent))),
      ...names.map((name) =>
        h(
          name in MATCHES ? "td.number.match" : "td.number",
          { "data-label": quantities()[name].title },
          ...cellOf(name, row),
        ),
      ),
      near ? h("td.said", { "data-label": "likeness" }, near.get(row)) : null,
      labelled ? labelCell(latent) : null,
      h("td.chips", { "data-label": "fires on" }, ...chips(idsAt(index.topTokens, row))),
      index.scoreName === "effect"
        ? h("td.chips", { "data-label": "promotes" }, ...chips(idsAt(index.topLogits, row)))
        : null,
    );
  });
  return h(
    "div.scroll",
    { "tabindex": "0", "role": "group", "aria-label": "Table of latents" },
    h(
      "table.latents",
      null,
      h(
        "thead",
        null,
        h(
          "tr",
          null,
          ...heads,
          labelled ? h("th.words", { scope: "col" }, "Label") : null,
          h(
            "th.words",
            { scope: "col", title: "Tokens under the 25 strongest activations, commonest first" },
            "Fires on",
          ),
          index.scoreName === "effect"
            ? h("th.words", { scope: "col", title: "Tokens whose logits rise most" }, "Promotes")
            : null,
        ),
      ),
      h("tbody", null, ...rows),
    ),
  );
}

function labelCell(latent) {
  const note = shelf.notes.get(latent);
  const label = labels.get(latent);
  return h(
    "td.said",
    { "data-label": "label", "dir": "auto" },
    label ? visibleText(label) : "",
    label && note ? " " : "",
    note ? h("small", { title: "Your note" }, "✎ ", visibleText(note)) : "",
  );
}

function scoreMeaning() {
  return index.scoreName === "effect"
    ? "Root mean square over the vocabulary of the centred logit effect, at the mean active value"
    : "Mean over all tokens of (activation × decoder norm)²";
}

function pager(view, nPages, where) {
  const to = (page, name) =>
    page < 1 || page > nPages ? h("span.off", null, name) : h("a", { href: address({ ...view, page }) }, name);
  return h(
    "nav.pager",
    { "aria-label": `Pages, ${where}` },
    to(view.page - 1, "← Previous"),
    `page ${COUNT.format(view.page)} of ${COUNT.format(nPages)}`,
    to(view.page + 1, "Next →"),
  );
}

function nothingFound(view) {
  const range = `latents have numbers from 0 to ${index.nLatents - 1}`;
  const like = likeWhat(view.q);
  if (like !== null)
    return rowOf(like) === undefined ? noPage(like) : `No latent with a page here is like latent ${like}.`;
  const [, asNumber] = /^\s*#?(\d+)\s*$/.exec(view.q) || [];
  if (asNumber !== undefined && Number(asNumber) >= index.nLatents) return `There is no latent ${asNumber}: ${range}.`;
  if (asNumber !== undefined && rowOf(Number(asNumber)) === undefined) return noPage(Number(asNumber));
  if (Object.keys(view.ranges).length) return "No latent is in these ranges. Widen a filter, or clear them.";
  if (view.only && !view.q) return "No latent of this list has a page here.";
  const where = {
    fires: "fires on such a token",
    promotes: "promotes such a token",
    label: labels.size ? "has such a label" : "has a label: these pages were made without",
    note: "has such a note of yours",
  };
  const among = view.only ? " of this list" : "";
  if (asNumber !== undefined && among) return `Latent ${asNumber} is not on this list.`;
  const anywhere = "fires on, or promotes, such a token, and no label or note has it";
  const three = ["fires", "promotes", ""].includes(view.within)
    ? " The search is for the three tokens that each fires on, or promotes, most."
    : "";
  return `No latent${among} ${where[view.within] || anywhere}.${three} To find one by number: ${range}.`;
}

function noPage(latent) {
  if (latent >= index.nLatents)
    return `There is no latent ${latent}: latents have numbers from 0 to ${index.nLatents - 1}.`;
  return `Latent ${latent} has no page: these are of ${COUNT.format(index.nShown)} of ${COUNT.format(index.nLatents)} latents.`;
}

async function showTable(view, above = null) {
  document.title = view.list ? `${view.list} – ${index.title}` : index.title;
  index.mostScore ??= index.score.reduce((a, b) => Math.max(a, b), 0);
  const rows = await list(view);
  const nPages = Math.max(1, Math.ceil(rows.length / ROWS_PER_PAGE));
  const current = { ...view, page: Math.min(view.page, nPages) };
  const part = rows.slice((current.page - 1) * ROWS_PER_PAGE, current.page * ROWS_PER_PAGE);
  const isAll = !view.q && !view.only && !view.name;
  main.replaceChildren(
    above ?? (view.only ? listHead(view) : h("h1.unseen", null, `Latents of ${index.title}`)),
    isAll && !above ? summary() : "",
    h(
      "div.above",
      null,
      h("p", null, count(rows.length, "latent"), ...saidOfSearch(view)),
      rows.length
        ? h("button.link", { type: "button", title: "One of these latents (r)", onclick: goAnywhere }, "Random")
        : "",
      nPages > 1 ? pager(current, nPages, "above") : "",
    ),
    filters(view),
    rows.length ? table(current, part) : h("p.empty", null, nothingFound(view)),
    rows.length && nPages > 1 ? pager(current, nPages, "below") : "",
  );
  say(rows.length ? main.querySelector(".above p").textContent : nothingFound(view));
}

function saidOfSearch(view) {
  const like = likeWhat(view.q);
  if (like !== null) return [" like ", h("a", { href: `#/latent/${like}` }, `latent ${like}`)];
  return view.q ? [" for “", ...visible(view.q), "”", view.within ? ` in ${WITHIN[view.within]}` : ""] : [];
}
