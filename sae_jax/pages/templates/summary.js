// What stands above the table of all latents: of what these pages are, and how the dictionary measures.
"use strict";

function configRows(value, name) {
  if (value === null || typeof value !== "object")
    return [h("tr", null, h("th", { scope: "row" }, name), h("td", null, String(value)))];
  return Object.entries(value).flatMap(([key, item]) => configRows(item, name ? `${name}.${key}` : key));
}

// What these pages are made of: [name, value, what it means], as the metrics.
function sample() {
  const nShown = index.nShown;
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
      `${COUNT.format(index.nSilent)} (${percent(index.nSilent / index.nLatents)})`,
      `latents that are active on none of these ${COUNT.format(index.nRows)} tokens. The evaluation counts silent latents ` +
        "on its own, held-out tokens; a latent is called dead only in training, when it has been silent for long",
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
  const box = h(
    "details.summary",
    null,
    h("summary", null, "About this dictionary"),
    h(
      "div.columns",
      null,
      h(
        "div",
        null,
        ...groups.flatMap(([title, facts]) => [h("h2", null, title), factList(facts)]),
        h(
          "details",
          null,
          h("summary", null, "What these numbers mean"),
          meanings(groups.flatMap(([, facts]) => facts)),
        ),
        config.length
          ? h("details", null, h("summary", null, "Configuration"), h("table", null, h("tbody", null, ...config)))
          : null,
      ),
      h(
        "figure",
        null,
        h("figcaption", null, "How often latents fire (share of tokens)"),
        histogram(counts, edges, "Histogram of log10 firing rate", 360, ticks),
      ),
    ),
  );
  // On a narrow screen it would push the table out of sight.
  box.open = matchMedia("(min-width: 721px)").matches;
  return box;
}
