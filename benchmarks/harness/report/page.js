"use strict";
// Everything is readable without this: it sorts tables, names runs, and opens what is folded where a link or the printer needs it.
const runsFolder = document.body.dataset.runsFolder;

function sortBy(heading, column) {
  const table = heading.closest("table");
  const descending = heading.getAttribute("aria-sort") === "ascending";
  for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
  heading.setAttribute("aria-sort", descending ? "descending" : "ascending");
  const body = table.tBodies[0];
  body.querySelectorAll("tr.runs").forEach((row) => row.remove());
  body.querySelectorAll("button[aria-expanded=true]").forEach((button) => button.setAttribute("aria-expanded", "false"));
  const key = (row) => {
    const cell = row.cells[column];
    const number = cell.dataset.sort ?? cell.textContent.trim();
    return number !== "" && isFinite(number) ? Number(number) : cell.textContent.trim();
  };
  const empty = (value) => value === "" || value === "–"; // last in both directions
  const rows = [...body.rows].map((row) => ({ row, value: key(row) }));
  rows.sort((a, b) => {
    if (empty(a.value) || empty(b.value)) return empty(a.value) - empty(b.value);
    const numbers = typeof a.value === "number" && typeof b.value === "number";
    const order = numbers ? a.value - b.value : String(a.value).localeCompare(String(b.value), "en", { numeric: true });
    return descending ? -order : order;
  });
  body.append(...rows.map((found) => found.row));
}

function button(text, act) {
  const made = document.createElement("button");
  made.type = "button";
  made.textContent = text;
  made.addEventListener("click", () => act(made));
  return made;
}

function link(href, text) {
  const made = document.createElement("a");
  made.href = href;
  made.textContent = text;
  return made;
}

function listRuns(cell, pressed) {
  const row = cell.parentElement;
  const open = pressed.getAttribute("aria-expanded") === "true";
  pressed.setAttribute("aria-expanded", String(!open));
  if (open) {
    row.nextElementSibling.remove();
    return;
  }
  const list = document.createElement("ul");
  for (const run of cell.dataset.runs.split(" ")) {
    const item = document.createElement("li");
    const at = `${runsFolder}/${run}`;
    const command = document.createElement("code");
    command.textContent = `snakemake --cores 1 results/runs/${run}/metrics.json`;
    item.append(`${run.split("/")[1]}: `, link(`${at}/metrics.json`, "numbers"), " · ", link(`${at}/run.json`, "settings"), " · ");
    item.append(link(`${at}/log.txt`, "log"), " · ", command);
    list.append(item);
  }
  const below = document.createElement("tr");
  below.className = "runs";
  below.insertCell().append(list);
  below.cells[0].colSpan = row.cells.length;
  row.after(below);
}

for (const cell of document.querySelectorAll("td[data-runs]")) {
  if (!cell.dataset.runs) continue;
  const pressed = button(cell.textContent, (self) => listRuns(cell, self));
  pressed.setAttribute("aria-expanded", "false");
  pressed.setAttribute("aria-label", `${cell.textContent} runs: list them`);
  pressed.title = cell.dataset.runs.replaceAll(" ", "\n");
  cell.replaceChildren(pressed);
}
for (const table of document.querySelectorAll("table.numbers, table.sentences")) {
  if (!table.tHead || table.tBodies[0].rows.length < 2) continue;
  [...table.tHead.rows[0].cells].forEach((heading, column) => {
    heading.replaceChildren(button(heading.textContent, () => sortBy(heading, column)));
  });
}
for (const box of document.querySelectorAll(".wide")) {
  // what scrolls can be reached and scrolled by keyboard
  box.tabIndex = 0;
  box.setAttribute("role", "region");
  box.setAttribute("aria-label", box.closest("figure")?.querySelector("b")?.textContent ?? box.closest("section").querySelector("h2").textContent);
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
  folded.forEach((one) => (one.open = true));
});
addEventListener("afterprint", () => folded.forEach((one) => (one.open = false)));

const links = new Map([...document.querySelectorAll("nav li a")].map((found) => [found.hash.slice(1), found]));
const inSight = new IntersectionObserver(
  (entries) => {
    for (const entry of entries.filter((found) => found.isIntersecting)) {
      links.forEach((found) => found.removeAttribute("aria-current"));
      links.get(entry.target.id)?.setAttribute("aria-current", "true");
    }
  },
  { rootMargin: "-20% 0px -75% 0px" },
);
document.querySelectorAll("main > section").forEach((section) => inSight.observe(section));
