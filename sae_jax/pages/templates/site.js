// The data of the site, and the address. These are plain scripts that share their names, since a page opened
// from disk may not load modules. The view is a function of the address:
//
//   #/?q=foo&sort=density&dir=asc&silent=1&page=2   table of latents, by effect unless it is said otherwise
//   #/latent/123?q=foo&sort=density               one latent; previous and next follow the table of the query
//   #/name?...                                    another view (addView in app.js)
"use strict";

const latentBlocks = new Map();
const textBlocks = new Map();
const scripts = new Map();
const matches = {}; // by cosine and by firing: of each latent, the one of index.other most like it (-1: none)
let index = null;
let tokens = null;
let searchable = []; // of each token, its text and what is shown for it
let listed = { key: null, rows: [] };

window.saeDashboard = {
  index: (data) => {
    index = withColumns(data);
  },
  tokens: (data) => {
    tokens = data;
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
  for (let i = 0, at = 0; i < ids.length; i++)
    for (let j = 0; j < nBytes; j++) ids[i] |= bytes[at++] << (8 * j);
  return ids;
}

// The index, its columns as arrays with a number a row; topTokens and topLogits have CHIPS a row.
const CHIPS = 3;

function withColumns(data) {
  const columns = {};
  for (const name of ["density", "score", "max"]) columns[name] = new Float32Array(bytesOf(data[name]).buffer);
  for (const name of ["topTokens", "topLogits"]) columns[name] = idsOf(bytesOf(data[name]), data.bytesPerToken);
  columns.latents = data.latents && new Uint32Array(bytesOf(data.latents).buffer);
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

function route() {
  const [path, query] = location.hash.replace(/^#/, "").split(/\?(.*)/s);
  const given = new URLSearchParams(query || "");
  const sort = ["latent", "density", "max"].includes(given.get("sort")) ? given.get("sort") : index.scoreName;
  const found = /^\/latent\/(\d+)$/.exec(path);
  return {
    latent: found ? Number(found[1]) : null,
    name: found ? null : path.replace(/^\//, ""),
    given,
    q: given.get("q") || "",
    sort,
    dir: ["asc", "desc"].includes(given.get("dir")) ? given.get("dir") : natural(sort),
    silent: given.get("silent") === "1",
    page: Math.max(1, Number.parseInt(given.get("page"), 10) || 1),
  };
}

// The way a column is sorted when it is first chosen.
function natural(sort) {
  return sort === "latent" ? "asc" : "desc";
}

function address(view) {
  const query = new URLSearchParams();
  if (view.q) query.set("q", view.q);
  if (view.sort !== index.scoreName) query.set("sort", view.sort);
  if (view.dir !== natural(view.sort)) query.set("dir", view.dir);
  if (view.silent) query.set("silent", "1");
  if (view.latent === null && view.page > 1) query.set("page", view.page);
  const path = view.latent === null ? "/" : `/latent/${view.latent}`;
  return `#${path}${String(query) && `?${query}`}`;
}
