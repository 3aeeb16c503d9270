"use strict";
// Figures lie in data-figure. They are drawn when they come near the window or the page
// is printed, in the page's own colours, and again when those change.
const theme = JSON.parse(document.body.dataset.theme);
const draw = (box) => {
  const style = getComputedStyle(document.documentElement);
  const figure = JSON.parse(box.dataset.figure, (_, value) =>
    Object.hasOwn(theme, value) ? style.getPropertyValue(theme[value]).trim() : value);
  Plotly.react(box, figure.data, figure.layout, {displayModeBar: false, responsive: true});
};
const charts = [...document.querySelectorAll(".chart")];
const near = new IntersectionObserver((entries) => {
  for (const entry of entries) if (entry.isIntersecting) { near.unobserve(entry.target); draw(entry.target); }
}, {rootMargin: "1200px"});
charts.forEach((box) => near.observe(box));
addEventListener("beforeprint", () => charts.filter((box) => !box.data).forEach(draw));
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => charts.filter((box) => box.data).forEach(draw));

// A click on a heading sorts by that column, figures the largest first; again, the other way.
const value = (row, i) => {
  const cell = row.cells[i];
  return "order" in cell.dataset ? Number(cell.dataset.order) : cell.textContent;
};
const compare = (a, b) => typeof a === "number" && typeof b === "number"
  ? a - b : String(a).localeCompare(String(b), undefined, {numeric: true});
for (const table of document.querySelectorAll("table.sortable")) {
  const body = table.tBodies[0];
  [...table.tHead.rows[0].cells].forEach((head, i) => head.querySelector("button").addEventListener("click", () => {
    const figures = head.classList.contains("figure");
    const before = head.getAttribute("aria-sort");
    const down = before ? before === "ascending" : figures;
    for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", down ? "descending" : "ascending");
    const rows = [...body.rows].sort((a, b) => (down ? -1 : 1) * compare(value(a, i), value(b, i)));
    body.append(...rows);
  }));
}
// Every word must be somewhere in the row, shortened text included.
for (const input of document.querySelectorAll("input.filter")) {
  const rows = [...document.getElementById(input.dataset.table).tBodies[0].rows];
  const texts = rows.map((row) => [...row.cells].map((c) => `${c.textContent} ${c.title}`).join(" ").toLowerCase());
  input.hidden = false;
  input.addEventListener("input", () => {
    const words = input.value.toLowerCase().split(/\s+/).filter(Boolean);
    rows.forEach((row, i) => { row.hidden = !words.every((word) => texts[i].includes(word)); });
  });
}
