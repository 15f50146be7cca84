// What the reader does: following links, searching, pointing, pressing keys.
"use strict";

// Pages of the site beside those of single latents: at #/name?... `show` fills the main part, given the parameters of
// the address. Other scripts add theirs.
const views = new Map();

function addView(name, title, show) {
  views.set(name, { title, show });
}

addView("", "Latents", () => showTable(route()));

function showViews(current) {
  const links = Array.from(views, ([name, { title }]) =>
    h("a", { href: `#/${name}`, ...(name === current ? { "aria-current": "page" } : {}) }, title),
  );
  document.querySelector("header nav").replaceChildren(...(links.length > 1 ? links : []));
}

const main = document.querySelector("main");
const search = document.getElementById("search");
const tip = document.getElementById("tip");

async function render() {
  tip.hidden = true;
  const view = route();
  if (document.activeElement !== search) search.value = view.q;
  try {
    showViews(view.name);
    if (view.latent !== null) await showLatent(view);
    else if (views.has(view.name)) await views.get(view.name).show(view.given);
    else throw new Error(`There is no page ${view.name}; the pages are ${Array.from(views.values(), (v) => v.title).join(", ")}.`);
  } catch (error) {
    main.replaceChildren(h("p.empty", { role: "alert" }, error.message));
  }
}

function searchFor(q) {
  const view = route();
  const to = address({ ...view, q, latent: null, page: 1 });
  // Typing changes the view without filling the history.
  if (view.latent === null && !view.name) history.replaceState(null, "", to);
  else history.pushState(null, "", to);
  render();
}

function showTip(event) {
  const span = event.target.closest?.(".context .token");
  tip.hidden = !span;
  if (!span) return;
  const { id, pos, value } = span.dataset;
  tip.replaceChildren(h("b", null, value ? number(Number(value)) : "0"), ` at position ${pos}, token ${id}`);
  const box = span.getBoundingClientRect();
  tip.style.left = `${Math.min(box.left, innerWidth - tip.offsetWidth - 8)}px`;
  tip.style.top = `${box.top > 40 ? box.top - tip.offsetHeight - 6 : box.bottom + 6}px`;
}

function press(event) {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  if (event.target === search) {
    if (event.key === "Escape") search.blur();
    return;
  }
  if (event.key === "/") {
    event.preventDefault();
    search.focus();
    search.select();
  }
  const rel = { ArrowLeft: "prev", ArrowRight: "next" }[event.key];
  document.querySelector(`a[rel=${rel}]`)?.click();
}

document.addEventListener("DOMContentLoaded", () => {
  if (!index || !tokens) {
    main.replaceChildren(
      h("p.empty", { role: "alert" }, "The data folder is missing; copy the whole folder of the dashboard."),
    );
    return;
  }
  searchable = tokens.map((text) =>
    text === 0 ? "" : `${text}\n${Array.from(text, (c) => glyph(c) ?? c).join("")}`.toLowerCase(),
  );
  let pause = 0;
  search.addEventListener("input", () => {
    clearTimeout(pause);
    pause = setTimeout(() => searchFor(search.value), 120);
  });
  search.form.addEventListener("submit", (event) => {
    event.preventDefault();
    clearTimeout(pause);
    searchFor(search.value);
    main.querySelector("tbody a")?.focus();
  });
  window.addEventListener("hashchange", () => {
    render();
    scrollTo(0, 0);
  });
  document.addEventListener("keydown", press);
  document.addEventListener("mouseover", showTip);
  document.addEventListener(
    "scroll",
    () => {
      tip.hidden = true;
    },
    { passive: true },
  );
  render();
});
