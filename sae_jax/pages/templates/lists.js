// #/lists: the reader's lists and notes. The card of a latent in which they are written stands on its page.
"use strict";

function showLists() {
  document.title = `Lists – ${index.title}`;
  const file = h("input", { type: "file", accept: ".json,application/json", id: "import" });
  file.addEventListener("change", async () => {
    try {
      say(importShelf(JSON.parse(await file.files[0].text())));
      await render();
    } catch (error) {
      const wrong =
        error instanceof SyntaxError ? "This is no JSON file; choose one that was exported here." : error.message;
      main.querySelector(".wrong").textContent = wrong;
    }
  });
  main.replaceChildren(
    h("h1", null, "Lists and notes"),
    h(
      "p.soft",
      null,
      "They lie in this browser alone. A list's link holds its latents, so you can send it; notes go with the export.",
    ),
    shelf.refused ? h("p.wrong", { role: "alert" }, shelf.refused) : "",
    h(
      "div.acts",
      null,
      h("button", { type: "button", onclick: exportShelf }, "Export as a file"),
      h("label.file", null, "Import a file ", file),
    ),
    h("p.wrong", { role: "alert" }),
    listsTable(),
    notesTable(),
  );
}

function listsTable() {
  const rows = Array.from(shelf.lists, ([name, latents]) => {
    const to = listAddress(name, Array.from(latents));
    return h(
      "tr",
      null,
      h("td", null, h("a", { href: to, dir: "auto" }, visibleText(name))),
      h("td.number", null, count(latents.size, "latent")),
      h(
        "td",
        null,
        h(
          "button",
          { "type": "button", "aria-label": `Copy the link of ${name}`, "onclick": () => copyLink(to) },
          "Copy link",
        ),
        " ",
        h("button", { "type": "button", "aria-label": `Remove ${name}`, "onclick": () => removeList(name) }, "Remove"),
      ),
    );
  });
  if (!rows.length)
    return h("p.empty", null, "No lists yet. Press b on a latent's page to bookmark it, or put it on a list there.");
  return h("div.scroll", null, h("table.plain", null, h("caption", null, "Lists"), h("tbody", null, ...rows)));
}

function notesTable() {
  const rows = Array.from(shelf.notes)
    .sort(([a], [b]) => a - b)
    .map(([latent, note]) =>
      h(
        "tr",
        null,
        h("td.number", null, h("a", { href: `#/latent/${latent}` }, String(latent))),
        h("td.note", { dir: "auto" }, visibleText(note)),
        h("td.chips", null, ...(rowOf(latent) === undefined ? [] : chips(idsAt(index.topTokens, rowOf(latent))))),
      ),
    );
  if (!rows.length) return "";
  return h("div.scroll", null, h("table.plain", null, h("caption", null, "Notes"), h("tbody", null, ...rows)));
}

function listAddress(name, only) {
  return address({ latent: null, sort: index.scoreName, dir: natural(index.scoreName), only, list: name });
}

async function copyLink(to) {
  const link = new URL(to, location.href).href;
  try {
    await navigator.clipboard.writeText(link);
    say("Link copied.");
  } catch {
    prompt("This browser lets no page copy; the link is:", link);
  }
}

function removeList(name) {
  if (!confirm(`Remove the list ${name}? Its latents stay where they are.`)) return;
  changeShelf(({ lists }) => lists.delete(name));
  say(`Removed ${name}.`);
  render();
}

function exportShelf() {
  const text = JSON.stringify(toFile(), null, 1);
  const link = h("a", {
    href: URL.createObjectURL(new Blob([text], { type: "application/json" })),
    download: "lists.json",
  });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
}

// Above the table of a list that a link holds: its name, and a way to keep it.
function listHead(view) {
  const mine = shelf.lists.get(view.list);
  const same = mine && mine.size === view.only.length && view.only.every((latent) => mine.has(latent));
  const name = view.list || "Shared list";
  const keep = () => {
    const added = shelf.lists.has(name) ? "Added to your list" : "Kept as";
    changeShelf(({ lists }) => lists.set(name, new Set([...(lists.get(name) || []), ...view.only])));
    say(`${added} ${name}.`);
    render();
  };
  const strange = strangeParts(view.given.get("latents"));
  return h(
    "div.listhead",
    null,
    h("h1", { dir: "auto" }, visibleText(name)),
    same
      ? h("small", null, "one of your lists")
      : h("button", { type: "button", onclick: keep }, mine ? "Add to your list of this name" : "Keep in your lists"),
    h("button", { type: "button", onclick: () => copyLink(address(view)) }, "Copy link"),
    strange
      ? h(
          "p.wrong",
          { role: "alert" },
          `The link names ${strange.slice(0, 40)}, which is no latent of this dictionary; it is left out.`,
        )
      : "",
  );
}

// The card of a latent: on which lists it is, and the reader's note.
function shelfCard(latent) {
  const box = h("section.shelf", { "aria-label": "Lists and note" });
  const draw = () => {
    const names = Array.from(new Set([BOOKMARKS, ...shelf.lists.keys()]));
    const marks = names.map((name) => {
      const mark = h("input", { type: "checkbox", ...(name === BOOKMARKS ? { id: "bookmark" } : {}) });
      mark.checked = Boolean(shelf.lists.get(name)?.has(latent));
      mark.addEventListener("change", () => {
        putOnList(name, latent, mark.checked);
        say(`${mark.checked ? "On" : "Off"} the list ${name}.`);
      });
      return h("label.mark", { dir: "auto" }, mark, " ", visibleText(name));
    });
    const name = h("input", {
      "type": "text",
      "placeholder": "new list",
      "aria-label": "Name of a new list",
      "maxlength": LONGEST_NAME,
    });
    const form = h("form.newlist", null, name, h("button", { type: "submit" }, "Add"));
    form.addEventListener("submit", (event) => {
      event.preventDefault();
      if (wrongName(name.value.trim())) return say(wrongName(name.value.trim()));
      putOnList(name.value.trim(), latent, true);
      say(`On the list ${name.value.trim()}.`);
      draw();
      box.querySelector(".newlist input").focus();
    });
    lists.replaceChildren(...marks, form);
  };
  const lists = h("div.marks", null);
  const note = h("textarea", {
    id: "note",
    rows: "3",
    maxlength: LONGEST_NOTE,
    placeholder: "your note",
    spellcheck: "false",
    dir: "auto",
  });
  note.value = shelf.notes.get(latent) || "";
  note.addEventListener("change", () => writeNote(latent, note.value.trim()));
  let pause = 0;
  note.addEventListener("input", () => {
    clearTimeout(pause);
    pause = setTimeout(() => writeNote(latent, note.value.trim()), 400);
  });
  draw();
  box.append(
    h("h2", null, "Yours"),
    lists,
    h("label", { for: "note" }, "Note"),
    note,
    shelf.refused ? h("p.wrong", null, shelf.refused) : "",
  );
  return box;
}
