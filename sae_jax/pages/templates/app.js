// What the reader does: following links, searching, pointing, pressing keys.
"use strict";

// Pages of the site beside those of single latents: at #/name?... `show` fills the main part, given the parameters of
// the address. Other scripts add theirs.
const views = new Map();

function addView(name, title, show) {
  views.set(name, { title, show });
}

addView("", "Latents", () => showTable(route()));
addView("lists", "Lists", showLists);

function showViews(current) {
  const links = Array.from(views, ([name, { title }]) =>
    h("a", { href: `#/${name}`, ...(name === current ? { "aria-current": "page" } : {}) }, title),
  );
  document.querySelector("header nav").replaceChildren(...links);
}

const main = document.querySelector("main");
const search = document.getElementById("search");
const tip = document.getElementById("tip");
const said = document.getElementById("said");

// Tells what changed to those who do not see it.
function say(text) {
  said.textContent = text;
}

function showNothing(title, why) {
  main.replaceChildren(h("h1", { tabindex: "-1" }, title), h("p.empty", { role: "alert" }, why));
}

async function render() {
  tip.hidden = true;
  const view = route();
  if (document.activeElement !== search) search.value = view.q;
  document.body.classList.toggle("embed", view.embed);
  try {
    showViews(view.name);
    if (view.latent !== null) await showLatent(view);
    else if (views.has(view.name)) await views.get(view.name).show(view.given);
    else
      throw new Error(
        `There is no page ${view.name}; the pages are ${Array.from(views.values(), (v) => v.title).join(", ")}.`,
      );
  } catch (error) {
    showNothing(index.title, error.message);
  }
  if (view.embed) tellHeight();
}

function searchFor(q) {
  const view = route();
  const isTable = view.latent === null && ["", "compare"].includes(view.name);
  const kept = view.sort === "likeness" ? index.scoreName : view.sort;
  const sort = likeWhat(q) === null ? kept : "likeness";
  const dir = sort === view.sort ? view.dir : natural(sort);
  const to = address({ ...view, q, sort, dir, latent: null, name: isTable ? view.name : "", page: 1 });
  // Typing changes the view without filling the history.
  if (isTable) history.replaceState(null, "", to);
  else history.pushState(null, "", to);
  return render();
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

document.addEventListener("DOMContentLoaded", async () => {
  if (!index || !tokens) {
    main.replaceChildren(
      h("p.empty", { role: "alert" }, "The data folder is missing; copy the whole folder of the dashboard."),
    );
    return;
  }
  searchable = tokens.map((text) =>
    text === 0 ? "" : `${text}\n${Array.from(text, (c) => glyph(c) ?? c).join("")}`.toLowerCase(),
  );
  if (index.other) addView("compare", "Compare", showCompare);
  readShelf();
  let pause = 0;
  search.addEventListener("input", () => {
    clearTimeout(pause);
    pause = setTimeout(() => searchFor(search.value), 120);
  });
  search.form.addEventListener("submit", (event) => {
    event.preventDefault();
    clearTimeout(pause);
    searchFor(search.value).then(() => main.querySelector("tbody a")?.focus());
  });
  // Back leads to where one was on the page, a link to its top.
  const places = new Map();
  let followed = false;
  history.scrollRestoration = "manual";
  document.addEventListener("click", ({ target }) => {
    followed ||= Boolean(target.closest?.("a[href^='#']"));
  });
  window.addEventListener("hashchange", async ({ oldURL, newURL }) => {
    places.set(oldURL, scrollY);
    const to = followed ? 0 : places.get(newURL);
    followed = false;
    await render();
    scrollTo(0, to ?? 0);
    // Who follows a link with the keyboard goes on at the head of what it led to.
    (main.querySelector("h1[tabindex]") || main).focus({ preventScroll: true });
  });
  window.addEventListener("storage", ({ key }) => {
    if (key === shelfKey()) readShelf();
  });
  window.addEventListener("resize", () => route().embed && tellHeight());
  document.querySelector(".skip").addEventListener("click", (event) => {
    event.preventDefault();
    main.focus();
  });
  document.getElementById("help").addEventListener("click", showHelp);
  document.addEventListener("keydown", press);
  document.addEventListener("mouseover", showTip);
  document.addEventListener(
    "scroll",
    () => {
      tip.hidden = true;
    },
    { passive: true },
  );
  await render();
  if (!index.nLabels) return;
  // Of a million latents they take a second: the table stands there before.
  await script("labels.js").catch((error) => say(error.message));
  listed = { key: null, rows: [] };
  if (route().name !== "lists") await render(); // those may hold what the reader has begun
});
