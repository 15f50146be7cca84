// Which latents a view lists, and in which order.
"use strict";

const MATCHES = {
  cosine: ["Match, decoder", "Cosine with the nearest decoder row of the other dictionary"],
  firing: ["Match, firing", "Of the tokens on which it or its counterpart fires, the share on which both do (Jaccard)"],
};
let known = null;

// What latents are sorted and chosen by: of each quantity its title, what it means, and its values, one a row.
function quantities() {
  if (known) return known;
  known = {
    density: {
      title: "Density",
      meaning: "Share of the sampled tokens on which it is active",
      column: () => index.density,
    },
    [index.scoreName]: { title: capital(index.scoreName), meaning: scoreMeaning(), column: () => index.score },
    max: { title: "Max", meaning: "Largest activation in the sample", column: () => index.max },
  };
  index.shares.forEach((column, i) => {
    const meaning = `Of the lengths of its decoder rows to all sources, as the dictionary was trained, the share of ${index.sources[i]}`;
    known[`share${i}`] = { title: `In ${index.sources[i]}`, meaning, column: () => column };
  });
  if (index.other)
    for (const [name, [title, meaning]] of Object.entries(MATCHES)) {
      let column = null;
      const of = (values) => Float32Array.from({ length: index.nShown }, (_, row) => values[latentOf(row)]);
      known[name] = {
        title,
        meaning,
        column: () => (column ??= matches[name] ? of(matches[name].values) : new Float32Array(index.nShown)),
      };
    }
  return known;
}

function capital(word) {
  return word.charAt(0).toUpperCase() + word.slice(1);
}

// Rows of the columns, in the order of the view.
async function list(view) {
  const key = JSON.stringify([
    view.q,
    view.within,
    view.sort,
    view.dir,
    view.silent,
    view.ranges,
    view.only,
    shelf.changes,
  ]);
  if (listed.key === key) return listed.rows;
  const by = [view.sort, ...Object.keys(view.ranges)];
  if (by.some((name) => name in MATCHES)) await script("matches.js");
  const like = likeWhat(view.q);
  const near = like === null ? null : await likeness(like);
  const candidates = near ? Uint32Array.from(near.keys()) : view.only ? rowsOf(view.only) : null;
  const fits = near ? () => true : whereFound(view.q, view.within);
  const ranges = Object.entries(view.ranges).map(([name, range]) => [quantities()[name].column(), ...range]);
  const exact = /^\s*#?(\d+)\s*$/.exec(view.q);
  const rows = new Uint32Array(candidates ? candidates.length : index.nShown);
  const only = view.only && new Set(view.only);
  let n = 0;
  for (let i = 0; i < rows.length; i++) {
    const row = candidates ? candidates[i] : i;
    const named = exact && latentOf(row) === Number(exact[1]);
    const silent = index.density[row] === 0;
    if (silent && !(view.silent || named || only || near)) continue;
    if (near && only && !only.has(latentOf(row))) continue;
    if (!ranges.every(([column, low, high]) => column[row] >= low && column[row] <= high)) continue;
    if (named || fits(row)) rows[n++] = row;
  }
  const part = rows.subarray(0, n);
  const column = quantities()[view.sort]?.column();
  const rising = view.dir === "asc";
  if (!column && view.sort === "latent" && candidates) part.sort();
  listed = { key, rows: sorted(part, column, rising), near };
  return listed.rows;
}

function rowsOf(latents) {
  return Uint32Array.from(latents.map(rowOf).filter((row) => row !== undefined));
}

// Whether a row has the text that is searched, in its tokens, its label or the reader's note.
function whereFound(q, within) {
  const wanted = q.toLowerCase();
  if (!wanted) return () => true;
  const places = [];
  const asked = (name) => !within || within === name;
  if (asked("fires") || asked("promotes")) {
    const has = new Uint8Array(searchable.length);
    searchable.forEach((text, id) => {
      has[id] = text.includes(wanted);
    });
    const found = (ids) => (row) => {
      for (let i = row * CHIPS; i < row * CHIPS + CHIPS; i++) if (has[ids[i]]) return true;
      return false;
    };
    if (asked("fires")) places.push(found(index.topTokens));
    if (asked("promotes")) places.push(found(index.topLogits));
  }
  if (asked("label")) places.push((row) => labels.get(latentOf(row))?.toLowerCase().includes(wanted));
  if (asked("note")) places.push((row) => shelf.notes.get(latentOf(row))?.toLowerCase().includes(wanted));
  return (row) => places.some((place) => place(row));
}

// The rows that are like a latent, nearest first, with what is said of each: neighbours of its decoder row, then those
// that are active on the same tokens.
async function likeness(latent) {
  const said = new Map();
  const row = rowOf(latent);
  if (row === undefined) return said;
  const { near, coactive, count } = await fromBlock(latentBlocks, "latents", row, index.latentsPerFile);
  const say = (other, what) => {
    const its = rowOf(other);
    if (its !== undefined) said.set(its, said.has(its) ? `${said.get(its)}, ${what}` : what);
  };
  for (const [other, cosine] of near || []) say(other, `cosine ${cosine.toFixed(3)}`);
  for (const [other, both] of coactive || []) say(other, `on ${percent(both / count)} of the tokens of ${latent}`);
  return said;
}

// Rows in the order of a column (none: as they are), ties in order of number. A million rows take a tenth of a
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

// Previous and next in the table the reader came from, or by number where the latent is not in it.
async function neighbours(view) {
  const rows = await list(view);
  const row = rowOf(view.latent);
  const at = rows.indexOf(row);
  const around = at >= 0 ? [rows[at - 1], rows[at + 1]] : [row - 1, row + 1];
  return around.map((to) => (to >= 0 && to < index.nShown ? latentOf(to) : null));
}

// One of the latents of a view, another than is shown; null if there is none.
async function anyLatent(view) {
  const rows = Array.from(await list(view));
  const others = rows.length > 1 ? rows.length - 1 : rows.length;
  if (!others) return null;
  const at = Math.floor(Math.random() * others);
  return latentOf(rows[at] === rowOf(view.latent ?? -1) ? rows[rows.length - 1] : rows[at]);
}
