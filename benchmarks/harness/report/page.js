"use strict";
// Everything is readable without this: it sorts tables, names runs, and opens what is folded where a link or the printer needs it.
const { runsFolder, suite } = document.body.dataset;
const runNames = JSON.parse(document.getElementById("run-names").textContent); // by folder
const collator = new Intl.Collator("en", { numeric: true }); // "N 8" comes before "N 16"

function addButton(cell, act) {
  const button = document.createElement("button");
  button.type = "button";
  button.textContent = cell.textContent;
  button.addEventListener("click", act);
  cell.replaceChildren(button);
  return button;
}

// Sort the rows of a table by the column of a heading. A second click reverses the order.
function sortBy(heading) {
  const body = heading.closest("table").tBodies[0];
  const isDescending = heading.getAttribute("aria-sort") === "ascending";
  for (const other of heading.parentElement.cells) other.removeAttribute("aria-sort");
  heading.setAttribute("aria-sort", isDescending ? "descending" : "ascending");

  // open lists of runs are rows too, but have no cell in the column
  for (const button of body.querySelectorAll("button[aria-expanded=true]")) button.click();

  const filled = [];
  const empty = [];
  for (const row of body.rows) {
    const key = sortKey(row.cells[heading.cellIndex]);
    if (key === "" || key === "–") empty.push(row);
    else filled.push({ row, key });
  }
  filled.sort((one, other) => {
    const order = compareKeys(one.key, other.key);
    return isDescending ? -order : order;
  });
  for (const { row } of filled) body.append(row);
  for (const row of empty) body.append(row); // last in both directions
}

// Return the text that a cell is sorted by. The printed numbers of most columns are rounded, so their cells have the exact ones.
function sortKey(cell) {
  if (cell.dataset.sort !== undefined) return cell.dataset.sort;
  const text = cell.textContent.trim();
  return text.replace(/(\d),(?=\d{3})/g, "$1"); // 1,234 becomes 1234
}

function compareKeys(key, otherKey) {
  const difference = Number(key) - Number(otherKey);
  const areNumbers = !Number.isNaN(difference);
  return areNumbers ? difference : collator.compare(key, otherKey);
}

// List the runs of a cell in a new row below it, or remove that row.
function listRuns(cell, button) {
  const row = cell.parentElement;
  const isOpen = button.getAttribute("aria-expanded") === "true";
  button.setAttribute("aria-expanded", String(!isOpen));
  if (isOpen) {
    row.nextElementSibling.remove();
    return;
  }
  const list = document.createElement("ul");
  for (const run of cell.dataset.runs.split(" ")) list.append(describeRun(run));
  const wideCell = document.createElement("td");
  wideCell.colSpan = row.cells.length;
  wideCell.append(list);
  const listRow = document.createElement("tr");
  listRow.className = "runs";
  listRow.append(wideCell);
  row.after(listRow);
}

// Return a list item with the name of a run, the links to its files, and the command that makes it.
function describeRun(run) {
  const folder = `${runsFolder}/${run}`;
  const command = document.createElement("code");
  command.textContent = `snakemake --cores 1 results/runs/${run}/metrics.json --config suite=${suite}`;
  const item = document.createElement("li");
  // `append` adds a string as text, so that signs such as < need no escaping
  item.append(`${runNames[run]}: `);
  item.append(link("numbers", `${folder}/metrics.json`), " · ");
  item.append(link("settings", `${folder}/run.json`), " · ");
  item.append(link("log", `${folder}/log.txt`), " · ");
  item.append(command);
  return item;
}

function link(text, address) {
  const anchor = document.createElement("a");
  anchor.textContent = text;
  anchor.setAttribute("href", address);
  return anchor;
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
  box.setAttribute("aria-label", labelOfBox(box));
}

// Return the label of a box for screen readers: that of its image, else the title of its table or section.
function labelOfBox(box) {
  const image = box.querySelector("img");
  if (image) return image.alt;
  const title = box.closest("figure")?.querySelector("b");
  if (title) return title.textContent;
  return box.closest("section").querySelector("h2").textContent;
}

// Open everything that hides the target of a link, such as a table at report.html#glue_tests.
function unfold() {
  const target = findTarget();
  if (!target) return;
  for (const item of document.querySelectorAll("details")) {
    if (item.contains(target)) item.open = true;
  }
  target.scrollIntoView();
}

function findTarget() {
  try {
    return document.getElementById(decodeURIComponent(location.hash.slice(1)));
  } catch {
    return null; // the address is damaged, such as report.html#%
  }
}
addEventListener("hashchange", unfold);
unfold();

let folded = [];
addEventListener("beforeprint", () => {
  folded = [...document.querySelectorAll("details:not([open])")];
  for (const item of folded) item.open = true;
});
addEventListener("afterprint", () => {
  for (const item of folded) item.open = false;
});
