// Tables that a reader may sort: a button in each heading, numbers by their value and text by its letters.
"use strict";
for (const table of document.querySelectorAll("table.sortable")) {
  const headings = [...table.querySelectorAll("thead th")];
  const body = table.tBodies[0];
  headings.forEach((heading, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = heading.textContent;
    heading.replaceChildren(button);
    button.addEventListener("click", () => {
      const rises = heading.getAttribute("aria-sort") !== "ascending";
      for (const other of headings) other.removeAttribute("aria-sort");
      heading.setAttribute("aria-sort", rises ? "ascending" : "descending");
      const sign = rises ? 1 : -1;
      const of = (row) => {
        const cell = row.cells[column];
        return cell.dataset.key === undefined ? cell.textContent.trim() : Number(cell.dataset.key);
      };
      const compare = (a, b) => {
        const [x, y] = [of(a), of(b)];
        if (typeof x === "number" && typeof y === "number") return sign * (x - y);
        if (typeof x === typeof y) return sign * x.localeCompare(y);
        return typeof x === "number" ? -1 : 1; // what has no number comes last, either way
      };
      body.append(...[...body.rows].sort(compare));
    });
  });
}
