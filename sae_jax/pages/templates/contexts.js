// Stretches of text around a latent's activations, and the whole sequences they come from.
"use strict";

function context(seq, pos, ids, first, pairs, most) {
  const values = new Map();
  for (let i = 0; i < pairs.length; i += 2) values.set(pos + pairs[i], pairs[i + 1]);
  const value = values.get(pos);
  const spans = ids.map((id, i) => heated(id, first + i, values.get(first + i), most));
  spans[pos - first].classList.add("peak");
  const before = h("span.before", null, ...spans.slice(0, pos - first));
  const after = h("span.after", null, ...spans.slice(pos - first));
  const item = h("li.context", { "data-seq": seq, "data-pos": pos });
  const button = h(
    "button",
    {
      "type": "button",
      "aria-expanded": "false",
      "aria-label": `Whole sequence ${seq}`,
      "title": "Show the whole sequence",
      "onclick": async () => {
        const open = button.getAttribute("aria-expanded") === "true";
        if (!open && !item.querySelector(".whole")) {
          const failed = (error) => h("div.whole", { role: "alert" }, error.message);
          item.append(await whole(seq, pos, values, most).catch(failed));
        }
        button.setAttribute("aria-expanded", String(!open));
        item.classList.toggle("open", !open);
        const box = item.querySelector(".whole");
        const peak = box.querySelector(".peak");
        if (peak)
          box.scrollTop += peak.getBoundingClientRect().top - box.getBoundingClientRect().top - box.clientHeight / 2;
        if (route().embed) tellHeight();
      },
    },
    "›",
  );
  item.append(button, h("span.value", { title: `sequence ${seq}, position ${pos}` }, number(value)), before, after);
  return item;
}

async function whole(seq, pos, values, most) {
  const box = h("div.whole", { "tabindex": "0", "role": "group", "aria-label": `Sequence ${seq}` });
  const ids = unpack(await fromBlock(textBlocks, "text", seq, index.textsPerFile));
  ids.forEach((id, at) => {
    const span = heated(id, at, values.get(at), most);
    if (at === pos) span.classList.add("peak");
    if (Math.abs(at - pos) > index.reach) span.classList.add("far");
    // A token may hold the end of a line and the indentation of the next one.
    for (const end of span.querySelectorAll(".newline")) end.after(h("br"));
    box.append(span, h("wbr"));
  });
  return box;
}

function contexts(record, most) {
  const ids = unpack(record.ids);
  let at = 0;
  const items = record.seq.map((seq, i) => {
    const pos = record.pos[i];
    const first = Math.max(0, pos - index.before);
    const length = Math.min(record.length[i], pos + index.after + 1) - first;
    at += length;
    return context(seq, pos, ids.slice(at - length, at), first, record.values[i], most);
  });
  const group = (title, note, part) =>
    h(
      "section",
      null,
      h("h2", null, title, " ", h("small", null, note)),
      part.length ? h("ol.contexts", null, ...part) : null,
    );
  let from = record.nTop;
  const strongest = group("Strongest contexts", "one a sequence", items.slice(0, from));
  const sampled = record.intervals.map(([low, high, count, n], i) => {
    from += n;
    const title = `Interval ${record.intervals.length - i} of ${record.intervals.length}`;
    const size = `${COUNT.format(count)} token${count === 1 ? "" : "s"}`;
    return group(title, `activation ${number(low)} to ${number(high)}, ${size}`, items.slice(from - n, from));
  });
  return [strongest, ...sampled];
}
