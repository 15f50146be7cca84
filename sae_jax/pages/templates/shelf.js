// The reader's lists of latents and notes on them. They lie in this browser, under the digest of the dictionary; where
// it refuses to keep them they last as long as the page. Names and notes come from anywhere too: from files and links.
"use strict";

const LONGEST_NAME = 80;
const LONGEST_NOTE = 10000;
const BOOKMARKS = "Bookmarks";
const KIND = "sae_jax lists and notes";

// lists: name -> Set of latents; notes: latent -> text. `refused` says why they are not kept.
const shelf = { lists: new Map(), notes: new Map(), changes: 0, refused: "" };

function shelfKey() {
  return `${KIND} ${index.digest}`;
}

// Reads what another page of the dictionary may have written meanwhile.
function readShelf() {
  try {
    const kept = localStorage.getItem(shelfKey());
    if (kept !== null) Object.assign(shelf, fromFile(JSON.parse(kept)));
    else if (!shelf.refused) Object.assign(shelf, { lists: new Map(), notes: new Map() });
  } catch (error) {
    if (error instanceof DOMException) refuseShelf(error);
    else say("What this browser kept of your lists and notes cannot be read; they begin anew.");
  }
  shelf.changes += 1;
}

function refuseShelf(error) {
  const full = error.name === "QuotaExceededError";
  shelf.refused = full
    ? "This browser has no more room for lists and notes: export them before you close the page."
    : "This browser keeps nothing for a page opened like this: export lists and notes before you close the page.";
}

function changeShelf(change) {
  if (!shelf.refused) readShelf();
  change(shelf);
  shelf.changes += 1;
  try {
    localStorage.setItem(shelfKey(), JSON.stringify(toFile()));
    shelf.refused = "";
  } catch (error) {
    refuseShelf(error);
    say(shelf.refused);
  }
}

function putOnList(name, latent, isOn) {
  changeShelf(({ lists }) => {
    const latents = lists.get(name) || new Set();
    if (isOn) latents.add(latent);
    else latents.delete(latent);
    lists.set(name, latents);
  });
}

function writeNote(latent, text) {
  if (text === (shelf.notes.get(latent) || "")) return;
  changeShelf(({ notes }) => (text ? notes.set(latent, text) : notes.delete(latent)));
}

// Why a name is none for a list; "" if it is one.
function wrongName(name) {
  if (!name) return "Give the list a name.";
  return name.length > LONGEST_NAME
    ? `A name has at most ${LONGEST_NAME} characters; this one has ${name.length}.`
    : "";
}

function toFile() {
  return {
    kind: KIND,
    dictionary: index.digest,
    title: index.title,
    lists: Array.from(shelf.lists, ([name, latents]) => ({ name, latents: Array.from(latents) })),
    notes: Array.from(shelf.notes, ([latent, note]) => ({ latent, note })),
  };
}

// Lists and notes of a file; an Error that says what is wrong with it.
function fromFile(data) {
  if (data?.kind !== KIND || !Array.isArray(data.lists) || !Array.isArray(data.notes))
    throw new Error("This is no file of lists and notes; choose one that was exported here.");
  if (data.dictionary !== index.digest)
    throw new Error(
      `This file is of another dictionary, ${String(data.title).slice(0, LONGEST_NAME)}; open it on the pages of that.`,
    );
  const isLatent = (latent) => Number.isInteger(latent) && latent >= 0 && latent < index.nLatents;
  const lists = new Map();
  for (const list of data.lists) {
    if (
      typeof list?.name !== "string" ||
      wrongName(list.name) ||
      !Array.isArray(list.latents) ||
      !list.latents.every(isLatent)
    )
      throw new Error("A list of this file has no name, or holds what is no latent; nothing was imported.");
    lists.set(list.name, new Set(list.latents));
  }
  const notes = new Map();
  for (const each of data.notes) {
    if (!isLatent(each?.latent) || typeof each.note !== "string" || each.note.length > LONGEST_NOTE)
      throw new Error(
        `A note of this file is on no latent, or longer than ${LONGEST_NOTE} characters; nothing was imported.`,
      );
    notes.set(each.latent, each.note);
  }
  return { lists, notes };
}

// Puts what a file holds beside what is there: lists of one name become one, and of two notes on a latent both stay.
function importShelf(data) {
  const { lists, notes } = fromFile(data);
  changeShelf((mine) => {
    for (const [name, latents] of lists) mine.lists.set(name, new Set([...(mine.lists.get(name) || []), ...latents]));
    for (const [latent, note] of notes) {
      const old = mine.notes.get(latent);
      mine.notes.set(latent, !old || note.includes(old) ? note : old.includes(note) ? old : `${old}\n${note}`);
    }
  });
  return `Imported ${count(lists.size, "list")} and ${count(notes.size, "note")}.`;
}
