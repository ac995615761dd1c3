"use strict";
// Everything is readable without this: it sorts tables, names runs, and opens what is folded where a link or the printer needs it.
const { runsFolder, suite } = document.body.dataset;
const runNames = JSON.parse(document.getElementById("run-names").textContent); // by folder

function addButton(cell, act) {
  const button = document.createElement("button");
  button.type = "button";
  button.textContent = cell.textContent;
  button.addEventListener("click", act);
  cell.replaceChildren(button);
  return button;
}

function sortBy(heading) {
  const body = heading.closest("table").tBodies[0];
  const sign = heading.getAttribute("aria-sort") === "ascending" ? -1 : 1;
  for (const other of heading.parentElement.cells) other.removeAttribute("aria-sort");
  heading.setAttribute("aria-sort", sign < 0 ? "descending" : "ascending");
  body.querySelectorAll("button[aria-expanded=true]").forEach((button) => button.click());
  const rows = [...body.rows].map((row) => {
    const cell = row.cells[heading.cellIndex];
    return { row, key: cell.dataset.sort ?? cell.textContent.trim() };
  });
  const isEmpty = (key) => key === "" || key === "–"; // last in both directions
  const collate = new Intl.Collator("en", { numeric: true }).compare;
  rows.sort(({ key: a }, { key: b }) => {
    if (isEmpty(a) || isEmpty(b)) return isEmpty(a) - isEmpty(b);
    return sign * (isNaN(a - b) ? collate(a, b) : a - b);
  });
  body.append(...rows.map(({ row }) => row));
}

function listRuns(cell, button) {
  const row = cell.parentElement;
  const isOpen = button.getAttribute("aria-expanded") === "true";
  button.setAttribute("aria-expanded", String(!isOpen));
  if (isOpen) {
    row.nextElementSibling.remove();
    return;
  }
  const items = cell.dataset.runs.split(" ").map((run) => {
    const links = { numbers: "metrics.json", settings: "run.json", log: "log.txt" };
    const parts = Object.entries(links).map(([name, file]) => `<a href='${runsFolder}/${run}/${file}'>${name}</a>`);
    parts.push(`<code>snakemake --cores 1 results/runs/${run}/metrics.json --config suite=${suite}</code>`);
    return `<li>${runNames[run]}: ${parts.join(" · ")}</li>`;
  });
  row.insertAdjacentHTML("afterend", `<tr class="runs"><td colspan="${row.cells.length}"><ul>${items.join("")}</ul></td></tr>`);
}

for (const cell of document.querySelectorAll("td[data-runs]:not([data-runs=''])")) {
  const button = addButton(cell, () => listRuns(cell, button));
  button.setAttribute("aria-expanded", "false");
  button.setAttribute("aria-label", `${cell.textContent} runs: list them`);
  button.title = cell.dataset.runs.split(" ").map((run) => runNames[run]).join("\n");
}
for (const table of document.querySelectorAll("table.numbers, table.sentences")) {
  if (!table.tHead || table.tBodies[0].rows.length < 2) continue;
  for (const heading of table.tHead.rows[0].cells) addButton(heading, () => sortBy(heading));
}
for (const box of document.querySelectorAll(".wide")) {
  // what scrolls can be reached and scrolled by keyboard
  box.tabIndex = 0;
  box.setAttribute("role", "region");
  box.setAttribute("aria-label", box.querySelector("img")?.alt ?? box.closest("figure")?.querySelector("b")?.textContent ?? box.closest("section").querySelector("h2").textContent);
}

function unfold() {
  const target = location.hash && document.getElementById(decodeURIComponent(location.hash.slice(1)));
  if (!target) return;
  for (let outer = target; (outer = outer.parentElement?.closest("details")); ) outer.open = true;
  target.scrollIntoView();
}
addEventListener("hashchange", unfold);
unfold();

let folded = [];
addEventListener("beforeprint", () => {
  folded = [...document.querySelectorAll("details:not([open])")];
  folded.forEach((item) => (item.open = true));
});
addEventListener("afterprint", () => folded.forEach((item) => (item.open = false)));
