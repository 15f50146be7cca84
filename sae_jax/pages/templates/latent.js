// The page of one latent.
"use strict";

const latentLinks = []; // what other scripts put at the head of a latent's page: functions of its number

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
          const failed = (error) => h("p.whole", { role: "alert" }, error.message);
          item.append(await whole(seq, pos, values, most).catch(failed));
        }
        button.setAttribute("aria-expanded", String(!open));
        item.classList.toggle("open", !open);
      },
    },
    "›",
  );
  item.append(
    button,
    h("span.value", { title: `sequence ${seq}, position ${pos}` }, number(value)),
    before,
    after,
  );
  return item;
}

async function whole(seq, pos, values, most) {
  const box = h("p.whole", null);
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
    h("section", null, h("h2", null, title, " ", h("small", null, note)), h("ol.contexts", null, ...part));
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

function logitTable(title, pairs) {
  const most = Math.max(...pairs.map(([, value]) => Math.abs(value)));
  return h(
    "table.logits",
    null,
    h("caption", null, title),
    h(
      "tbody",
      null,
      ...pairs.map(([id, value]) =>
        h(
          "tr",
          null,
          h("td", null, chip(id)),
          h("td.number", null, signed(value), bar(Math.abs(value), 0, most)),
        ),
      ),
    ),
  );
}

// Other latents: [number, what is said of it].
function othersTable(view, title, others) {
  return h(
    "table.near",
    null,
    h("caption", null, title),
    h(
      "tbody",
      null,
      ...others.map(([latent, said]) => {
        const row = rowOf(latent);
        const shown = row !== undefined;
        return h(
          shown && index.density[row] ? "tr" : "tr.silent",
          null,
          h(
            "td",
            null,
            shown ? h("a", { href: address({ ...view, latent }) }, String(latent)) : String(latent),
          ),
          h("td.number", null, said),
          h("td.chips", null, ...chips(shown ? idsAt(index.topTokens, row).slice(0, 2) : [])),
        );
      }),
    ),
  );
}

async function showLatent(view) {
  const { latent } = view;
  document.title = `Latent ${latent} – ${index.title}`;
  const row = rowOf(latent);
  if (row === undefined) {
    main.replaceChildren(
      h("p.empty", { role: "alert" }, noPage(latent)),
    );
    return;
  }
  const record = await fromBlock(latentBlocks, "latents", row, index.latentsPerFile);
  if (route().latent !== latent) return; // the reader has gone on meanwhile
  const most = index.max[row];
  const alive = record.count > 0;
  const [previous, next] = neighbours(view);
  const step = (to, name, rel) =>
    to === null ? h("span.off", null, name) : h("a", { href: address({ ...view, latent: to }), rel }, name);
  const facts = [
    ["density", alive ? index.density[row] : "silent", "share of the sampled tokens on which it is active"],
    ["activations", alive ? `${COUNT.format(record.count)} of ${COUNT.format(index.nRows)} tokens` : "0", ""],
    ["mean when active", record.mean, "mean of its values where it is active"],
    ["max", most, "largest value in the sample"],
    [index.scoreName, index.score[row], scoreMeaning()],
    ["decoder norm", record.norm, "length of its decoder row"],
  ];
  const edges = alive
    ? record.histogram.map((_, i) => (i * most) / record.histogram.length).concat(most)
    : null;
  main.replaceChildren(
    h(
      "div.above.latent",
      null,
      h("h1", null, `Latent ${latent}`),
      h(
        "nav",
        { "aria-label": "Latents" },
        ...latentLinks.map((link) => link(latent)),
        step(previous, "← Previous", "prev"),
        h("a", { href: address({ ...view, latent: null }) }, view.q ? "Back to the search" : "All latents"),
        step(next, "Next →", "next"),
      ),
    ),
    record.label ? h("p.label", null, record.label[0], " ", h("small", null, record.label[1])) : "",
    factList(facts),
    h(
      "div.cards",
      null,
      alive
        ? h(
            "figure",
            null,
            h("figcaption", null, "Activations"),
            histogram(record.histogram, edges, `Histogram of the activations of latent ${latent}`, 240, [
              [0, "0"],
              [most / 2, number(most / 2)],
              [most, number(most)],
            ]),
            h(
              "p.fires",
              null,
              `Strongest ${record.tokens.reduce((n, [, count]) => n + count, 0)} on `,
              ...record.tokens
                .slice(0, 6)
                .flatMap(([id, count]) => [
                  chip(id, h("small", null, ` ×${count}`)),
                  " ",
                ]),
            ),
          )
        : null,
      record.up ? logitTable("Promoted tokens", record.up) : null,
      record.down ? logitTable("Suppressed tokens", record.down) : null,
      record.near && record.near.length
        ? othersTable(
            view,
            "Nearest decoder rows",
            record.near.map(([other, cosine]) => [other, cosine.toFixed(3)]),
          )
        : null,
      record.coactive && record.coactive.length
        ? othersTable(
            view,
            "Active on the same tokens (Jaccard)",
            record.coactive.map(([other, count, jaccard]) => [
              other,
              `${COUNT.format(count)} (${jaccard.toFixed(3)})`,
            ]),
          )
        : null,
    ),
    ...(alive
      ? contexts(record, most)
      : [h("p.empty", null, `Silent on all ${COUNT.format(index.nRows)} tokens of the sample.`)]),
  );
}

// Previous and next in the table the reader came from, or by number where the latent is not in it.
function neighbours(view) {
  const rows = list(view);
  const row = rowOf(view.latent);
  const at = rows.indexOf(row);
  const around = at >= 0 ? [rows[at - 1], rows[at + 1]] : [row - 1, row + 1];
  return around.map((to) => (to >= 0 && to < index.nShown ? latentOf(to) : null));
}
