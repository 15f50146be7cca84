// #/text?text=...&latent=12&token=3&sort=sum    the latents of a text as it is typed: those of the token that is
// chosen, and those of the whole text. One latent may be chosen, whose strength colours the tokens.
"use strict";

const MOST_ROWS = 50;
const ORDERS = [
  ["max", "Max", "Largest value in the text", 1],
  ["sum", "Sum", "Sum of its values in the text", 2],
  ["tokens", "Tokens", "Tokens that it is active at", 3],
];
const EXAMPLE = "def area(width, height):\n    return width * height";

addView("text", "Text", async (given) => {
  document.title = `Text – ${index.title}`;
  const about = await modelOrWhyNot("Latents of a text");
  if (about && route().name === "text" && !stands("text", given)) showText(kept("text", given), about);
});

function showText(given, about) {
  const wholeNumber = (name) => (/^\d+$/.test(given.get(name) ?? "") ? Number(given.get(name)) : null);
  const state = {
    text: given.get("text") ?? EXAMPLE,
    latent: wholeNumber("latent"),
    token: wholeNumber("token"),
    sort: ORDERS.some(([name]) => name === given.get("sort")) ? given.get("sort") : "max",
  };
  let found = null;
  let asking = null;
  let pause = 0;

  const typed = h("textarea", { rows: "4", spellcheck: "false" });
  typed.value = state.text;
  const status = h("p.status", { role: "status" });
  const shown = h("div.found", null);
  stand(
    "text",
    () => found && draw(),
    h("h1", { tabindex: "-1" }, "Latents of a text"),
    h("div.card", null, field("Text", typed), status),
    shown,
  );
  typed.addEventListener("input", () => {
    state.text = typed.value;
    state.token = null;
    clearTimeout(pause);
    pause = setTimeout(() => look(), PAUSE);
  });
  look();

  async function look(focus) {
    write();
    asking?.abort();
    const mine = new AbortController();
    asking = mine;
    try {
      const answer = await ask("api/latents", { text: state.text, latent: state.latent }, mine.signal);
      found = await answer.json();
      const most = about.nContext === null ? "" : ` of at most ${COUNT.format(about.nContext)}`;
      status.textContent = `${COUNT.format(found.tokens.length)}${most} tokens`;
      status.classList.remove("failed");
      draw();
      if (focus) shown.querySelector(focus)?.focus();
    } catch (error) {
      if (error.name === "AbortError") return;
      status.textContent = error.message;
      status.classList.add("failed");
      shown.replaceChildren();
    }
  }

  function write() {
    const query = new URLSearchParams({ text: state.text });
    for (const name of ["latent", "token"]) if (state[name] !== null) query.set(name, state[name]);
    if (state.sort !== "max") query.set("sort", state.sort);
    keep("text", query);
  }

  function draw() {
    const last = found.tokens.length - 1;
    const at = Math.min(state.token ?? last, last);
    shown.replaceChildren(tokensOf(at), h("div.two", null, atToken(at), overText()));
  }

  // Changes what is shown, and keeps the focus at what was pressed.
  function choose(change, focus) {
    const isSame = !("latent" in change);
    Object.assign(state, change);
    if (!isSame) return look(focus);
    write();
    draw();
    shown.querySelector(focus)?.focus();
  }

  function tokensOf(at) {
    const values = found.values ?? [];
    const most = Math.max(largest(state.latent), ...values);
    const nodes = found.tokens.flatMap((text, i) => {
      const value = values[i] ?? 0;
      const what = state.latent === null ? "" : `, latent ${state.latent}: ${number(value)}`;
      // No button element: a token that holds the end of a line goes on in the next one.
      const token = h(
        "span.token",
        {
          "role": "button",
          "data-token": i,
          "aria-pressed": String(i === at),
          "tabindex": i === at ? "0" : "-1",
          "title": `token ${i}, ${COUNT.format(found.nActive[i])} latents active${what}`,
          "--heat-share": (value / most || 0).toFixed(3),
          "onclick": () => choose({ token: i }, `[data-token="${i}"]`),
        },
        ...visible(text),
      );
      for (const end of token.querySelectorAll(".newline")) end.after(h("br"));
      return [token, h("wbr")];
    });
    const box = h(
      "div.typed",
      { "role": "group", "aria-label": "Tokens; arrow keys go from one to the next" },
      ...nodes,
    );
    box.addEventListener("keydown", (event) => {
      const to = {
        "ArrowLeft": at - 1,
        "ArrowRight": at + 1,
        "Home": 0,
        "End": found.tokens.length - 1,
        "Enter": at,
        " ": at,
      }[event.key];
      if (to === undefined || !found.tokens[to]) return;
      event.preventDefault();
      event.stopPropagation();
      choose({ token: to }, `[data-token="${to}"]`);
    });
    const coloured =
      state.latent === null
        ? ["No latent is chosen to colour the tokens; ", h("em", null, "show"), " one from a table below."]
        : [
            "Coloured by latent ",
            latentLink(state.latent),
            " ",
            ...saidOf(state.latent),
            " ",
            button("hide", { "data-hide": "" }, () => choose({ latent: null }, "[data-show]")),
          ];
    return h("section.card", { "aria-label": "Tokens" }, box, h("p.soft", null, ...coloured));
  }

  function showButton(latent, table) {
    const isShown = latent === state.latent;
    const key = `${table}-${latent}`;
    return button(
      "show",
      {
        "data-show": key,
        "aria-pressed": String(isShown),
        "aria-label": `show latent ${latent}`,
        "title": "Colour the tokens by it",
      },
      () => choose({ latent: isShown ? null : latent }, `[data-show="${key}"]`),
    );
  }

  function latentRow(latent, table, ...cells) {
    return h(
      "tr",
      latent === state.latent ? { class: "chosen" } : null,
      h("td.number", null, latentLink(latent)),
      ...cells,
      h("td.chips", null, ...saidOf(latent)),
      h("td.tools", null, showButton(latent, table), steerLink(latent)),
    );
  }

  function atToken(at) {
    const pairs = found.atTokens[at];
    const rows = [];
    for (let i = 0; i < pairs.length; i += 2)
      rows.push(
        latentRow(pairs[i], "token", h("td.number", null, number(pairs[i + 1]), bar(pairs[i + 1], 0, pairs[1]))),
      );
    const n = found.nActive[at];
    const note = n > rows.length ? `the ${rows.length} strongest of ${COUNT.format(n)}` : `${n} active`;
    const heads = [
      h("th.number", { scope: "col" }, "Latent"),
      h("th.number", { scope: "col" }, "Value"),
      h("th", { scope: "col" }, "Fires on"),
      h("th", { scope: "col" }, h("span.unseen", null, "Actions")),
    ];
    return h(
      "section",
      { "aria-label": "At the token" },
      h(
        "h2",
        null,
        "At ",
        h("span.chip", null, h("span.token", null, ...visible(found.tokens[at]))),
        " ",
        h("small", null, note),
      ),
      rows.length ? tableOf(heads, rows) : h("p.empty", null, "No latent is active at this token."),
    );
  }

  function overText() {
    const [, , , by] = ORDERS.find(([name]) => name === state.sort);
    const ranked = [...found.ranked].sort((a, b) => b[by] - a[by] || a[0] - b[0]);
    const heads = ORDERS.map(([sort, name, meaning]) =>
      h(
        "th.number",
        { scope: "col", ...(sort === state.sort ? { "aria-sort": "descending" } : {}) },
        button(sort === state.sort ? `${name} ↓` : name, { "title": meaning, "data-sort": sort }, () =>
          choose({ sort }, `[data-sort="${sort}"]`),
        ),
      ),
    );
    const rows = ranked
      .slice(0, MOST_ROWS)
      .map(([latent, max, sum, n]) =>
        latentRow(latent, "text", ...[max, sum, n].map((value) => h("td.number", null, number(value)))),
      );
    return h(
      "section",
      { "aria-label": "Over the text" },
      h(
        "h2",
        null,
        "Over the text ",
        h(
          "small",
          null,
          `${rows.length < found.nRanked ? `the first ${rows.length} of ` : ""}${COUNT.format(found.nRanked)} latents`,
        ),
      ),
      rows.length
        ? tableOf(
            [
              h("th.number", { scope: "col" }, "Latent"),
              ...heads,
              h("th", { scope: "col" }, "Fires on"),
              h("th", { scope: "col" }, h("span.unseen", null, "Actions")),
            ],
            rows,
          )
        : h("p.empty", null, "No latent is active in this text."),
    );
  }
}

function tableOf(heads, rows) {
  return h(
    "div.scroll",
    null,
    h("table.ranked", null, h("thead", null, h("tr", null, ...heads)), h("tbody", null, ...rows)),
  );
}
