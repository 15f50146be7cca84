// The data of the site, and the address. These are plain scripts that share their names, since a page opened
// from disk may not load modules. The view is a function of the address:
//
//   #/?q=foo&sort=density&dir=asc&silent=1&page=2   table of latents, by effect unless it is said otherwise
//   #/?density=1e-4..0.01&within=label            those of a range, or of another place of the text that is searched
//   #/?latents=3,17-20&list=spikes                those of a list
//   #/?q=~123                                     those that are like latent 123
//   #/latent/123?q=foo&sort=density               one latent; previous and next follow the table of the query
//   #/embed/123                                   the same without all that leads elsewhere, for a frame
//   #/name?...                                    another view (addView in app.js)
"use strict";

const latentBlocks = new Map();
const textBlocks = new Map();
const scripts = new Map();
const matches = {}; // by cosine and by firing: of each latent, the one of index.other most like it (-1: none)
let index = null;
let tokens = null;
let labels = new Map(); // of each latent that has one, what it stands for
let searchable = []; // of each token, its text and what is shown for it
let listed = { key: null, rows: [] };

window.saeDashboard = {
  index: (data) => {
    index = withColumns(data);
  },
  tokens: (data) => {
    tokens = data;
  },
  labels: (data) => {
    labels = new Map(data);
  },
  matches: (data) => {
    for (const [name, columns] of Object.entries(data))
      matches[name] = columns && {
        latents: new Int32Array(bytesOf(columns.latents).buffer),
        values: new Float32Array(bytesOf(columns.values).buffer),
      };
  },
  latents: (block, records) => latentBlocks.set(block, records),
  text: (block, texts) => textBlocks.set(block, texts),
};

function bytesOf(base64) {
  if (Uint8Array.fromBase64) return Uint8Array.fromBase64(base64);
  const text = atob(base64);
  const bytes = new Uint8Array(text.length);
  for (let i = 0; i < text.length; i++) bytes[i] = text.charCodeAt(i);
  return bytes;
}

// Token ids of so many bytes each, little-endian; all bits set: none.
function idsOf(bytes, nBytes) {
  const ids = new Uint32Array(bytes.length / nBytes);
  for (let i = 0, at = 0; i < ids.length; i++) for (let j = 0; j < nBytes; j++) ids[i] |= bytes[at++] << (8 * j);
  return ids;
}

// The index, its columns as arrays with a number a row; topTokens and topLogits have CHIPS a row.
const CHIPS = 3;

function withColumns(data) {
  const columns = {};
  for (const name of ["density", "score", "max"]) columns[name] = new Float32Array(bytesOf(data[name]).buffer);
  for (const name of ["topTokens", "topLogits"]) columns[name] = idsOf(bytesOf(data[name]), data.bytesPerToken);
  columns.latents = data.latents && new Uint32Array(bytesOf(data.latents).buffer);
  columns.shares = data.shares.map((share) => new Float32Array(bytesOf(share).buffer));
  return { ...data, ...columns, noToken: 256 ** data.bytesPerToken - 1 };
}

// The number of the latent of a row of the columns, and back; undefined if it has no row.
function latentOf(row) {
  return index.latents ? index.latents[row] : row;
}

function rowOf(latent) {
  if (!index.latents) return latent >= 0 && latent < index.nShown ? latent : undefined;
  let [low, high] = [0, index.nShown];
  while (low < high) {
    const middle = (low + high) >> 1;
    if (index.latents[middle] < latent) low = middle + 1;
    else high = middle;
  }
  return index.latents[low] === latent ? low : undefined;
}

// The tokens of a row of topTokens or topLogits.
function idsAt(column, row) {
  return Array.from(column.subarray(row * CHIPS, row * CHIPS + CHIPS)).filter((id) => id !== index.noToken);
}

function script(name) {
  if (index?.isWhole) return Promise.resolve(); // all of it is in the page
  if (!scripts.has(name)) {
    scripts.set(
      name,
      new Promise((resolve, reject) => {
        const element = h("script", { src: `data/${name}` });
        element.onload = resolve;
        element.onerror = () => {
          scripts.delete(name);
          reject(new Error(`data/${name} cannot be read; copy the whole folder of the dashboard`));
        };
        document.head.append(element);
      }),
    );
  }
  return scripts.get(name);
}

async function fromBlock(blocks, kind, number, perFile) {
  const block = Math.floor(number / perFile);
  await script(`${kind}-${String(block).padStart(3, "0")}.js`);
  return blocks.get(block)[number - block * perFile];
}

const WITHIN = {
  "": "everywhere",
  "fires": "tokens it fires on",
  "promotes": "tokens it promotes",
  "label": "labels",
  "note": "your notes",
};

function route() {
  const [path, query] = location.hash.replace(/^#/, "").split(/\?(.*)/s);
  const given = new URLSearchParams(query || "");
  const q = given.get("q") || "";
  const usual = likeWhat(q) === null ? index.scoreName : "likeness";
  const sort = given.get("sort") in quantities() || given.get("sort") === "latent" ? given.get("sort") : usual;
  const found = /^\/(latent|embed)\/(\d+)$/.exec(path);
  const ranges = {};
  for (const name of Object.keys(quantities())) {
    const range = readRange(given.get(name));
    if (range) ranges[name] = range;
  }
  return {
    latent: found ? Number(found[2]) : null,
    embed: found?.[1] === "embed",
    name: found ? null : path.replace(/^\//, ""),
    given,
    q,
    within: given.get("within") in WITHIN ? given.get("within") : "",
    sort,
    dir: ["asc", "desc"].includes(given.get("dir")) ? given.get("dir") : natural(sort),
    silent: given.get("silent") === "1",
    ranges,
    only: given.has("latents") ? readNumbers(given.get("latents")) : null,
    list: (given.get("list") || "").slice(0, LONGEST_NAME),
    page: Math.max(1, Number.parseInt(given.get("page"), 10) || 1),
  };
}

// The way a column is sorted when it is first chosen.
function natural(sort) {
  return sort === "latent" || sort === "likeness" || sort in MATCHES ? "asc" : "desc";
}

// The address of a view of latents: of the table, in which it is named otherwise of that view, or of one latent.
function address(view) {
  const query = new URLSearchParams();
  const like = likeWhat(view.q || "") !== null;
  if (view.q) query.set("q", view.q);
  if (view.within) query.set("within", view.within);
  if (view.sort !== (like ? "likeness" : index.scoreName) && (view.sort !== "likeness" || like))
    query.set("sort", view.sort);
  if (view.dir !== natural(view.sort)) query.set("dir", view.dir);
  if (view.silent) query.set("silent", "1");
  for (const [name, range] of Object.entries(view.ranges || {})) query.set(name, writeRange(range));
  if (view.only) query.set("latents", writeNumbers(view.only));
  if (view.list) query.set("list", view.list);
  if (view.latent === null && view.page > 1) query.set("page", view.page);
  const path = view.latent === null ? `/${view.name || ""}` : `/${view.embed ? "embed" : "latent"}/${view.latent}`;
  // Readable in the address bar: these need no escape there.
  const text = String(query).replace(/%2C/g, ",").replace(/%7E/g, "~");
  return `#${path}${text && `?${text}`}`;
}

// "~123": 123; null for another search.
function likeWhat(q) {
  const found = /^\s*~\s*#?(\d+)\s*$/.exec(q);
  return found && Number(found[1]);
}

// "0.1..2", "0.1.." or "..2": [0.1, 2], [0.1, Infinity], [-Infinity, 2]; null where it is no range.
function readRange(text) {
  const parts = (text || "").split("..");
  if (parts.length !== 2) return null;
  const [low, high] = parts.map((part) => (part.trim() ? Number(part) : null));
  if (Number.isNaN(low) || Number.isNaN(high) || (low === null && high === null)) return null;
  return [low ?? -Infinity, high ?? Infinity];
}

function writeRange(range) {
  return range.map((end) => (Number.isFinite(end) ? String(end) : "")).join("..");
}

// "3,17-20": 3, 17, 18, 19, 20, each once and in this order; what is no number of a latent is left out.
function readNumbers(text) {
  const numbers = new Set();
  for (const part of text.split(",")) {
    const found = /^\s*(\d{1,9})(?:-(\d{1,9}))?\s*$/.exec(part);
    if (!found) continue;
    const last = Math.min(Number(found[2] ?? found[1]), index.nLatents - 1);
    for (let latent = Number(found[1]); latent <= last; latent++) numbers.add(latent);
  }
  return Array.from(numbers);
}

function writeNumbers(numbers) {
  const parts = [];
  for (let i = 0; i < numbers.length;) {
    let end = i;
    while (numbers[end + 1] === numbers[end] + 1) end++;
    parts.push(end > i + 1 ? `${numbers[i]}-${numbers[end]}` : numbers.slice(i, end + 1).join(","));
    i = end + 1;
  }
  return parts.join(",");
}

// The first part of a text of numbers that is none of a latent; "" if all are.
function strangeParts(text) {
  const fits = (part) => {
    const found = /^\s*(\d{1,9})(?:-(\d{1,9}))?\s*$/.exec(part);
    return found && Number(found[1]) <= Number(found[2] ?? found[1]) && Number(found[2] ?? found[1]) < index.nLatents;
  };
  return text.split(",").find((part) => part.trim() && !fits(part)) || "";
}
