// The ranges that latents are chosen by, and the place that is searched: all of it is part of the address.
"use strict";

function filters(view) {
  const names = Object.keys(quantities()).filter((name) => !(name in MATCHES) || view.name === "compare");
  const count = Object.keys(view.ranges).length + (view.within ? 1 : 0) + (view.silent ? 1 : 0);
  const silent = h("input", { type: "checkbox", id: "silent" });
  silent.checked = view.silent;
  silent.addEventListener("change", () => goTo({ ...view, silent: silent.checked, page: 1 }, "silent"));
  const box = h(
    "details.filters",
    null,
    h("summary", null, count ? `Filters (${count})` : "Filters"),
    h(
      "div.ranges",
      null,
      ...names.map((name) => rangeField(view, name)),
      withinField(view),
      h(
        "label.mark",
        { title: `Latents that are active on none of the ${COUNT.format(index.nRows)} sampled tokens` },
        silent,
        " silent latents too",
      ),
      count
        ? h("a", { href: address({ ...view, ranges: {}, within: "", silent: false, page: 1 }) }, "Clear the filters")
        : null,
    ),
    h("p.wrong", { role: "alert" }),
  );
  box.open = count > 0 || filters.open;
  box.addEventListener("toggle", () => {
    filters.open = box.open;
  });
  return box;
}

filters.open = false; // once the reader has opened it, it stays open

function rangeField(view, name) {
  const { title, meaning } = quantities()[name];
  const end = (which, text) => {
    const value = view.ranges[name]?.[which];
    const input = h("input", {
      "id": `${name}-${which}`,
      "type": "text",
      "inputmode": "decimal",
      "placeholder": text,
      "aria-label": `${title} ${which ? "at most" : "at least"}`,
    });
    if (Number.isFinite(value)) input.value = String(value);
    input.addEventListener("change", () => setRange(view, name, which, input));
    return input;
  };
  return h("fieldset", null, h("legend", { title: meaning }, title), end(0, "at least"), " – ", end(1, "at most"));
}

function setRange(view, name, which, input) {
  const text = input.value.trim().replace(",", ".");
  const number = Number(text);
  if (text && !Number.isFinite(number)) {
    input.setAttribute("aria-invalid", "true");
    main.querySelector(".filters .wrong").textContent = `${text} is no number; write one as 0.01 or 1e-4.`;
    return;
  }
  const range = [...(view.ranges[name] || [-Infinity, Infinity])];
  range[which] = text ? number : [-Infinity, Infinity][which];
  const { [name]: _, ...others } = view.ranges;
  const ranges = range.some(Number.isFinite) ? { ...others, [name]: range } : others;
  goTo({ ...view, ranges, page: 1 }, input.id);
}

function withinField(view) {
  const options = Object.entries(WITHIN).map(([name, title]) => h("option", { value: name }, title));
  const select = h("select", { id: "within" }, ...options);
  select.value = view.within;
  select.addEventListener("change", () => goTo({ ...view, within: select.value, page: 1 }, "within"));
  return h("label.within", null, "Search in ", select);
}

// Changes the view in place of the one that is shown, and leaves the reader where they were.
async function goTo(view, id) {
  history.replaceState(null, "", address(view));
  await render();
  document.getElementById(id)?.focus();
}
