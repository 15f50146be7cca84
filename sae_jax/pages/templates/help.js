// What keys do, and what can be searched: pressed, and told.
"use strict";

const KEYS = [
  ["/", "search"],
  ["← →", "previous and next latent of the list you came from"],
  ["r", "a latent of the list at random"],
  ["b", "bookmark the latent"],
  ["n", "write a note on the latent"],
  ["Esc", "leave the field, close this"],
  ["?", "show this"],
];
const SEARCHES = [
  ["123", "latent 123"],
  ["~123", "latents that are like latent 123"],
  ["word", "latents that fire on, or promote, a token with these letters, or whose label or note has them"],
];

function press(event) {
  if (event.ctrlKey || event.metaKey || event.altKey || document.querySelector("dialog[open]")) return;
  if (event.target.matches?.("input, textarea, select")) {
    if (event.key === "Escape") event.target.blur();
    return;
  }
  const act = {
    "/": () => {
      search.focus();
      search.select();
    },
    "r": goAnywhere,
    "b": () => document.getElementById("bookmark")?.click(),
    "n": () => document.getElementById("note")?.focus(),
    "?": showHelp,
  }[event.key];
  if (act && !document.body.classList.contains("embed")) {
    event.preventDefault();
    act();
  }
  const rel = { ArrowLeft: "prev", ArrowRight: "next" }[event.key];
  if (rel && !event.target.closest?.(".scroll, .whole")) document.querySelector(`a[rel=${rel}]`)?.click();
}

function showHelp() {
  const part = (title, rows) => [
    h("h2", null, title),
    h("dl.meanings", null, ...rows.flatMap(([key, does]) => [h("dt", null, h("kbd", null, key)), h("dd", null, does)])),
  ];
  const close = h("button", { type: "button", onclick: () => box.close() }, "Close");
  const box = h(
    "dialog",
    { "aria-label": "Keys and searches" },
    ...part("Keys", KEYS),
    ...part("Find", SEARCHES),
    close,
  );
  box.addEventListener("close", () => box.remove());
  box.addEventListener("click", ({ target }) => {
    if (target === box) box.close();
  });
  document.body.append(box);
  box.showModal();
}

async function goAnywhere() {
  const view = route();
  const latent = await anyLatent(view);
  if (latent !== null) location.hash = address({ ...view, latent });
}
