// What the views that ask the model share. The server is sae_jax/pages/explore.py; its answers hold text of strangers
// and of the model, which enters the page as text nodes only.
"use strict";

const PAUSE = 120; // ms without a key, after which the model is asked

async function ask(path, content, signal) {
  const sent = {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify(content),
    signal,
  };
  const answer = await fetch(path, content === undefined ? {} : sent).catch((error) => {
    if (error.name === "AbortError") throw error;
    throw new Error("The server does not answer; if it has ended, start sae-jax explore again.");
  });
  if (!answer.ok) {
    const { error } = await answer.json().catch(() => ({}));
    throw new Error(error || `The server answers ${answer.status}.`);
  }
  return answer;
}

// Calls `take` with each line of JSON as it comes.
async function eachLine(answer, take) {
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const lines = (rest + value).split("\n");
    rest = lines.pop();
    for (const line of lines) take(JSON.parse(line));
  }
}

let told = null;

// What the model can be asked, or null where there is none: then the page says so.
async function modelOrWhyNot(title) {
  told ??= ask("api/about").then((answer) => answer.json());
  try {
    const about = await told;
    if (!about.noModel) return about;
    main.replaceChildren(
      h("h1", { tabindex: "-1" }, title),
      h("p.empty", { role: "alert" }, `No model is at hand: ${about.noModel}`),
    );
    return null;
  } catch (error) {
    told = null;
    throw error;
  }
}

// What stands for a latent beside its number: its label, if it has one, and the tokens that it fires on.
function saidOf(latent) {
  const row = rowOf(latent);
  const label = labels.get(latent);
  const said = label === undefined ? [] : [h("span.says", { dir: "auto" }, visibleText(label)), " "];
  return row === undefined ? said : [...said, ...chips(idsAt(index.topTokens, row))];
}

// Largest value in the sample; 0 where it is not known.
function largest(latent) {
  const row = rowOf(latent);
  return row === undefined ? 0 : index.max[row];
}

function latentLink(latent) {
  return h("a", { href: `#/latent/${latent}` }, String(latent));
}

function steerLink(latent) {
  return h("a", { "href": `#/steer?latent=${latent}&scale=5`, "aria-label": `Steer with latent ${latent}` }, "steer");
}

function button(name, attributes, act) {
  const element = h("button", { type: "button", ...attributes }, name);
  element.addEventListener("click", act);
  return element;
}

// A field with its label. Its keys are its own: not those of the page, such as / for the search.
function field(name, control) {
  control.addEventListener("keydown", (event) => event.stopPropagation());
  return h("label.field", null, h("span", null, name), control);
}

function writeAddress(view, given) {
  const query = String(given);
  history.replaceState(null, "", `#/${view}${query && `?${query}`}`);
}

// The parameters of a view's address; where it has none, those it had when the reader left it.
const left = new Map();

function kept(view, given) {
  if (![...given].length && left.has(view)) writeAddress(view, left.get(view));
  const current = [...given].length ? given : (left.get(view) ?? given);
  left.set(view, current);
  return current;
}

// What a view has put into the page. If the page is drawn anew at the same address, as when labels have come, what the
// reader has typed stays: `redraw` shows what else is new.
let standing = null;

function stand(view, redraw, ...nodes) {
  main.replaceChildren(...nodes);
  standing = { view, redraw, node: nodes[0] };
}

function stands(view, given) {
  const isSame = ["", String(left.get(view))].includes(String(given));
  if (standing?.view !== view || !standing.node.isConnected || !isSame) return false;
  standing.redraw();
  return true;
}

function keep(view, given) {
  left.set(view, given);
  writeAddress(view, given);
}

latentLinks.push((latent) => h("a", { href: `#/steer?latent=${latent}&scale=5` }, "Steer with it"));
