// #/steer?latent=12&scale=5&how=clamp&prompt=...    what the model writes with latents set, beside what it writes
// without.
"use strict";

const WAYS = {
  clamp: ["set to", "Each latent has this value at every token, whatever it was; all else stays."],
  add: ["add", "So much is added along each latent's decoder row, whatever its value is."],
  norm: ["push", "An edit along the latents' decoder rows, as long as so many times what it is added to."],
};
const SETTINGS = { n: ["Tokens", 40, 1, 1], temperature: ["Temperature", 0, 0, 0.1], seed: ["Seed", 0, 0, 1] };
const SIDES = { unsteered: "Unsteered", steered: "Steered" };
const PROMPT = "def read_file(path):\n";

let writing = null; // what is being written, until it is stopped or the reader leaves

window.addEventListener("hashchange", () => writing?.abort());

addView("steer", "Steer", async (given) => {
  document.title = `Steer – ${index.title}`;
  const about = await modelOrWhyNot("Steering");
  if (about && route().name === "steer" && !stands("steer", given)) showSteer(kept("steer", given), about);
});

function cannotSteer(title, why) {
  main.replaceChildren(h("h1", { tabindex: "-1" }, title), h("p.empty", { role: "alert" }, why));
}

// The latents, how they are set and the settings of what is written: as elements, and as what the server is asked.
function steering(view, given, about, more) {
  const numbers = (name) => given.getAll(name).map(Number).filter(Number.isFinite);
  const scales = numbers("scale");
  const rows = numbers("latent").map((latent, i) => ({ latent, scale: scales[i] ?? 5 }));
  if (!rows.length) rows.push({ latent: "", scale: 5 });
  const way = h("select", null, ...about.hows.map((how) => h("option", { value: how }, WAYS[how][0])));
  if (about.hows.includes(given.get("how"))) way.value = given.get("how");
  const norm = numberField(given.get("norm") ?? 0.5, { step: "0.1" });
  const settings = Object.entries(SETTINGS).map(([name, [title, usual, min, step]]) => {
    const control = numberField(given.get(name) ?? usual, { min, step });
    control.addEventListener("input", write);
    return [name, title, control];
  });
  const list = h("div.latents-set", null);
  const meaning = h("p.soft", null);
  const normField = field("Times its norm", norm);
  const wayField = field("How", way);
  for (const control of [way, norm]) control.addEventListener("input", () => (draw(), write()));

  function row(each) {
    const latent = numberField(each.latent, { min: 0, max: index.nLatents - 1, step: 1 });
    const scale = numberField(each.scale, { step: "any" });
    const said = h("span.setting", null);
    const say = () => {
      const most = each.latent === "" ? 0 : largest(each.latent);
      const value = way.value === "norm" ? "" : ` = ${number(each.scale * most)}, its max is ${number(most)}`;
      said.replaceChildren(
        ...(each.latent === ""
          ? []
          : most
            ? [latentLink(each.latent), value, " ", ...saidOf(each.latent)]
            : ["not active in the sample"]),
      );
    };
    latent.addEventListener(
      "input",
      () => ((each.latent = latent.value === "" ? "" : Number(latent.value)), say(), write()),
    );
    scale.addEventListener("input", () => ((each.scale = Number(scale.value)), say(), write()));
    say();
    const remove = button("Remove", { "aria-label": `Remove latent ${each.latent}` }, () => {
      rows.splice(rows.indexOf(each), 1);
      draw();
      write();
      list.querySelector("input")?.focus();
    });
    const scaleField = field("Times its max", scale);
    scaleField.hidden = way.value === "norm";
    return h("div.latent-set", null, field("Latent", latent), scaleField, said, rows.length > 1 ? remove : null);
  }

  function draw() {
    list.replaceChildren(
      ...rows.map(row),
      button("Add a latent", {}, () => {
        rows.push({ latent: "", scale: 5 });
        draw();
        [...list.querySelectorAll(".latent-set")].at(-1).querySelector("input").focus();
      }),
    );
    meaning.textContent = WAYS[way.value][1];
    normField.hidden = way.value !== "norm";
  }

  function write() {
    const query = new URLSearchParams();
    for (const { latent, scale } of rows)
      if (latent !== "") (query.append("latent", latent), query.append("scale", scale));
    if (way.value !== about.hows[0]) query.set("how", way.value);
    if (way.value === "norm") query.set("norm", norm.value);
    for (const [name, , control] of settings)
      if (Number(control.value) !== SETTINGS[name][1]) query.set(name, control.value);
    for (const [name, value] of Object.entries(more())) query.set(name, value);
    keep(view, query);
  }

  function asked() {
    const latents = rows
      .filter(({ latent }) => latent !== "")
      .map(({ latent, scale }) => {
        const most = largest(latent);
        if (!most)
          throw new Error(`Latent ${latent} is not active in the sample, so it has no largest value; choose another.`);
        return { latent, value: way.value === "norm" ? most : scale * most };
      });
    if (!latents.length) throw new Error("Name at least one latent by its number.");
    const [n, temperature, seed] = settings.map(([, title, control]) => {
      if (control.value === "" || !control.checkValidity())
        throw new Error(`${title}: ${control.validationMessage || "give a number"}`);
      return Number(control.value);
    });
    return { latents, how: way.value, norm: Number(norm.value), n_tokens: n, temperature, seed };
  }

  draw();
  const panel = [
    list,
    h("div.fields", null, wayField, normField, ...settings.map(([, title, control]) => field(title, control))),
    meaning,
  ];
  return { panel, asked, write };
}

function numberField(value, attributes) {
  const control = h("input", { type: "number", inputmode: "decimal", ...attributes });
  control.value = value;
  return control;
}

// Two columns that text is written into, named by their sides and, where there are several pairs, a number.
function columns(which, ...begin) {
  const parts = Object.entries(SIDES).map(([side, title]) => {
    // A long text is scrolled, by keys too.
    const text = h("p.written", { dir: "auto", tabindex: "0" }, ...begin.map((node) => node.cloneNode(true)));
    const end = h("small", { role: "status" });
    return {
      side,
      text,
      end,
      said: "",
      node: h("section", { "aria-label": title + which }, h("h2", null, title, " ", end), text),
    };
  });
  return {
    node: h("div.two.sides", null, ...parts.map((part) => part.node)),
    of: Object.fromEntries(parts.map((p) => [p.side, p])),
  };
}

// A button that begins to write, and one that stops it. The first keeps the focus while it can do nothing.
function buttonsOf(name, keys, write) {
  const isBusy = () => begin.getAttribute("aria-disabled") === "true";
  const act = () => isBusy() || write();
  const begin = button(name, { "class": "main", "aria-disabled": "false", "aria-keyshortcuts": keys }, act);
  const stop = button("Stop", { disabled: "" }, () => writing?.abort());
  const busy = (is) => {
    begin.setAttribute("aria-disabled", String(is));
    if (!is && document.activeElement === stop) begin.focus();
    stop.disabled = !is;
  };
  return { begin, stop, act, busy };
}

// Asks, and writes into the columns until both texts end or are stopped. Returns whether they came to their ends.
async function writeInto(written, content, buttons, alert) {
  writing?.abort();
  const mine = new AbortController();
  writing = mine;
  const parts = Object.values(written.of);
  alert.textContent = "";
  buttons.busy(true);
  for (const part of parts) part.end.textContent = "writing …";
  try {
    await eachLine(await ask("api/steer", content, mine.signal), (event) => {
      const part = written.of[event.side];
      if (event.text) {
        part.said += event.text;
        part.text.append(visibleText(event.text));
      }
      if (event.end) part.end.textContent = event.end;
      if (event.error) throw new Error(event.error);
    });
    return true;
  } catch (error) {
    for (const part of parts) if (part.end.textContent === "writing …") part.end.textContent = "stopped";
    if (error.name !== "AbortError") {
      mine.abort();
      alert.textContent = error.message;
    }
    return false;
  } finally {
    if (writing === mine) buttons.busy(false);
  }
}

function showSteer(given, about) {
  if (about.noSteering) return cannotSteer("Steering", about.noSteering);
  const prompt = h("textarea", { rows: "4", spellcheck: "false" });
  prompt.value = given.get("prompt") ?? PROMPT;
  const settings = steering("steer", given, about, () => ({ prompt: prompt.value }));
  const alert = h("p.status.failed", { role: "alert" });
  const result = h("div", null);
  const buttons = buttonsOf("Write", "Control+Enter", write);
  prompt.addEventListener("input", settings.write);
  prompt.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) buttons.act();
  });
  stand(
    "steer",
    () => {},
    h("h1", { tabindex: "-1" }, "Steering"),
    h(
      "div.card",
      null,
      ...settings.panel,
      field("Prompt", prompt),
      h("div.tools", null, buttons.begin, buttons.stop, alert),
    ),
    result,
  );

  async function write() {
    try {
      const content = { prompt: prompt.value, ...settings.asked() };
      const written = columns("", h("span.prompt", null, visibleText(prompt.value)));
      result.replaceChildren(written.node);
      await writeInto(written, content, buttons, alert);
      for (const part of Object.values(written.of))
        if (part.said) part.node.append(latentsOf(prompt.value + part.said));
    } catch (error) {
      alert.textContent = error.message;
    }
  }
}

function latentsOf(text) {
  return h("a", { href: `#/text?${new URLSearchParams({ text })}` }, "Its latents");
}
