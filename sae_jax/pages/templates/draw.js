// Elements, numbers, histograms, tokens. Text of tokens comes from anywhere, so it enters the page as text
// nodes only, never as markup.
"use strict";

const SVG = "http://www.w3.org/2000/svg";
const COUNT = new Intl.NumberFormat("en");

function h(tag, attributes, ...children) {
  const [name, ...classes] = tag.split(".");
  const element = document.createElement(name);
  if (classes.length) element.className = classes.join(" ");
  for (const [key, value] of Object.entries(attributes || {})) {
    if (key === "onclick") element.addEventListener("click", value);
    else if (value === null) continue;
    else if (key.startsWith("--")) element.style.setProperty(key, value);
    else element.setAttribute(key, value);
  }
  element.append(...children.filter((child) => child !== null));
  return element;
}

function svg(tag, attributes, ...children) {
  const element = document.createElementNS(SVG, tag);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  element.append(...children);
  return element;
}

function number(value) {
  if (typeof value !== "number") return value === null ? "–" : String(value);
  if (Number.isInteger(value)) return COUNT.format(value);
  const size = Math.abs(value);
  return size >= 1e5 || size < 1e-3 ? value.toExponential(2) : String(Number(value.toPrecision(4)));
}

// The same in four figures all, to stand in a column.
function figures(value) {
  return value >= 1e-3 && value < 1e4 ? value.toPrecision(4) : number(value);
}

// A share as people say it; one that is not nothing never reads as 0.
function percent(share) {
  return `${share && share < 0.1 ? (100 * share).toPrecision(share < 0.01 ? 1 : 2) : (100 * share).toFixed(0)} %`;
}

function count(n, name) {
  return `${COUNT.format(n)} ${name}${n === 1 ? "" : "s"}`;
}

function signed(value) {
  return (value < 0 ? "−" : "+") + Math.abs(value).toPrecision(3);
}

function histogram(counts, edges, name, width, ticks) {
  const [height, foot] = [96, 16];
  const most = Math.max(1, ...counts);
  const x = (edge) => ((edge - edges[0]) / (edges[edges.length - 1] - edges[0])) * width;
  const bars = counts.map((count, i) => {
    // A bin with anything in it stays visible beside a bin of thousands.
    const tall = count ? Math.max(1.5, (count / most) * height) : 0;
    const place = {
      x: x(edges[i]) + 0.5,
      y: height - tall,
      height: tall,
      width: Math.max(0.5, x(edges[i + 1]) - x(edges[i]) - 1),
    };
    const range = `${number(edges[i])} to ${number(edges[i + 1])}: ${COUNT.format(count)}`;
    return svg("rect", place, svg("title", {}, range));
  });
  const labels = ticks.map(([at, label]) => {
    const anchor = x(at) < 12 ? "start" : x(at) > width - 12 ? "end" : "middle";
    return svg("text", { "x": x(at), "y": height + 13, "text-anchor": anchor }, label);
  });
  const axis = svg("line", { x1: 0, x2: width, y1: height + 0.5, y2: height + 0.5 });
  const box = {
    "class": "histogram",
    "viewBox": `0 0 ${width} ${height + foot}`,
    "role": "img",
    "aria-label": name,
  };
  return svg("svg", box, ...bars, axis, ...labels);
}

function glyph(character) {
  const code = character.codePointAt(0);
  if (character === " ") return "·";
  if (character === "\n") return "↵";
  if (character === "\t") return "→";
  // Python's surrogateescape: a byte that is no UTF-8 on its own.
  if (code >= 0xdc80 && code <= 0xdcff) return `\\x${(code - 0xdc00).toString(16)}`;
  if (code < 0x20 || code === 0x7f) return `\\x${code.toString(16).padStart(2, "0")}`;
  // Invisible characters, and those that turn the direction of the text around them.
  if (/[\p{Cc}\p{Cf}\p{Cs}\p{Zl}\p{Zp}]/u.test(character) || code === 0xa0) return `\\u{${code.toString(16)}}`;
  return null;
}

function visible(text) {
  const nodes = [];
  let plain = "";
  for (const character of text || "∅") {
    const shown = glyph(character);
    if (shown === null) plain += character;
    else {
      if (plain) nodes.push(plain);
      plain = "";
      nodes.push(
        h(`span.${shown.length > 1 ? "escape" : "glyph"}${character === "\n" ? ".newline" : ""}`, null, shown),
      );
    }
  }
  if (plain) nodes.push(plain);
  return nodes;
}

// A text of somebody: names of lists, notes, labels. Spaces and ends of lines are what they are.
function visibleText(text) {
  return Array.from(text, (c) => (/[ \n\t]/.test(c) ? c : (glyph(c) ?? c))).join("");
}

function token(id, attributes) {
  return h("span.token", attributes, ...visible(tokens[id]));
}

const LONG_RUN = 6;

// A token by itself. Long runs of one character, such as indentation, are counted.
function chip(id, ...more) {
  const nodes = (tokens[id].match(/(.)\1*/gsu) || [""]).flatMap((run) => {
    const characters = Array.from(run);
    if (characters.length < LONG_RUN) return visible(run);
    return [...visible(characters[0]), h("small", null, `×${characters.length}`)];
  });
  return h("span.chip", null, h("span.token", null, ...nodes), ...more);
}

function heated(id, pos, value, most) {
  const attributes = { "data-id": id, "data-pos": pos };
  if (value) Object.assign(attributes, { "data-value": value, "--heat-share": (value / most).toFixed(3) });
  return token(id, attributes);
}

function unpack(base64) {
  return Array.from(idsOf(bytesOf(base64), index.bytesPerToken));
}
