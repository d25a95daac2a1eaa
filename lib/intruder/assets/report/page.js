"use strict";
// Counting: a cosine m is stored as the number v of grid points 0.001, 0.002 ... that are <= m, so m < E/1000 exactly
// when v < E for a whole number E. `lo` and `hi` are the v of its proven bounds, equal where the value is known.
const data = JSON.parse(document.getElementById("data").textContent);
const at = (id) => document.getElementById(id);
const make = (tag, text, attributes = {}) => {
  const element = document.createElement(tag);
  if (text !== undefined) element.textContent = text;
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  return element;
};
const state = { E: data.E, k: data.k, chosen: null };

function verdict(matrix, j, E) { // 1 intruder, 0 match, null not decided at this threshold
  if (E === data.exact) return matrix.hit[j];
  if (matrix.hi[j] < E) return 1;
  if (matrix.lo[j] >= E) return 0;
  return null;
}
function measure(matrix) {
  let count = 0, open = 0, energy = 0, all = 0;
  for (let j = 0; j < state.k; j++) {
    const is = verdict(matrix, j, state.E), square = matrix.sv[j] ** 2;
    all += square;
    if (is === 1) { count++; energy += square; } else if (is === null) open++;
  }
  return { count, open, energy: all > 0 ? energy / all : 0 };
}
const span = (count, open) => open ? `${count}–${count + open}` : `${count}`;
const plural = (n, word) => `${n} ${word}${n === 1 ? "" : "s"}`;
const epsilonText = () => String(state.E / 1000).padEnd(4, "0");

function grids() {
  const groups = new Map();
  data.matrices.forEach((matrix, index) => {
    if (!groups.has(matrix.group)) groups.set(matrix.group, { layers: new Set(), modules: new Set(), cells: new Map() });
    const group = groups.get(matrix.group), key = JSON.stringify([matrix.layer, matrix.module]);
    group.layers.add(matrix.layer);
    group.modules.add(matrix.module);
    if (!group.cells.has(key)) group.cells.set(key, []);
    group.cells.get(key).push(index);
  });
  for (const [name, group] of groups) {
    const box = make("div", undefined, { class: "grid" }), table = make("table"), head = make("tr");
    table.append(make("caption", name || "layers"));
    head.append(make("th", "layer", { scope: "col" }));
    for (const module of group.modules) head.append(make("th", module.replaceAll(".", ".\u200b"), { scope: "col" }));
    const thead = make("thead"), body = make("tbody");
    thead.append(head);
    for (const layer of [...group.layers].sort((a, b) => a - b)) {
      const row = make("tr");
      row.append(make("th", layer, { scope: "row" }));
      for (const module of group.modules) {
        const cell = make("td"), members = group.cells.get(JSON.stringify([layer, module]));
        if (members) {
          const button = make("button", "", { type: "button", tabindex: "-1", "aria-pressed": "false" });
          button.members = members;
          button.where = `layer ${layer}, ${module}`;
          button.addEventListener("click", () => choose(members[0], false));
          cell.append(button);
        }
        row.append(cell);
      }
      body.append(row);
    }
    table.append(thead, body);
    table.addEventListener("keydown", arrows);
    table.querySelector("button").tabIndex = 0;
    box.append(table);
    at("grids").append(box);
  }
}
function arrows(event) {
  const step = { ArrowRight: [0, 1], ArrowLeft: [0, -1], ArrowDown: [1, 0], ArrowUp: [-1, 0] }[event.key];
  const cell = event.target.closest("td");
  if (!step || !cell) return;
  event.preventDefault();
  const rows = cell.closest("tbody").rows;
  let row = cell.parentNode.sectionRowIndex, column = cell.cellIndex;
  for (;;) {
    row += step[0]; column += step[1];
    const next = rows[row]?.cells[column];
    if (!next || column < 1) return;
    const button = next.querySelector("button");
    if (!button) continue;
    event.currentTarget.querySelectorAll("button").forEach((other) => { other.tabIndex = -1; });
    button.tabIndex = 0;
    button.focus();
    return;
  }
}
function paintGrids(all) {
  for (const button of document.querySelectorAll(".grid button")) {
    let count = 0, open = 0;
    for (const index of button.members) { count += all[index].count; open += all[index].open; }
    const share = count / (state.k * button.members.length);
    button.textContent = span(count, open);
    button.style.setProperty("--share", Math.sqrt(share).toFixed(3));
    button.setAttribute("aria-label", `${button.where}: ${span(count, open)} intruders among ${state.k * button.members.length} vectors`);
    button.setAttribute("aria-pressed", String(button.members.includes(state.chosen)));
  }
}
const rows = [...document.querySelectorAll("#matrices tbody tr")];
rows.forEach((row, index) => {
  row.index = index;
  const cell = row.cells[0], button = make("button", cell.textContent, { type: "button", class: "name" });
  button.addEventListener("click", () => choose(index, true));
  cell.replaceChildren(button);
});
function paintTable(all) {
  for (const row of rows) {
    const { count, open, energy } = all[row.index];
    row.querySelector(".count").textContent = span(count, open);
    row.querySelector(".energy").textContent = (100 * energy).toFixed(1) + " %";
    row.classList.toggle("chosen", row.index === state.chosen);
  }
}
function choose(index, move) {
  state.chosen = index;
  paint();
  at("detail").hidden = false;
  if (move) { at("detail").focus({ preventScroll: true }); at("detail").scrollIntoView({ block: "nearest" }); }
}
function cosine(matrix, j) {
  if (matrix.m[j] !== null) return matrix.m[j].toFixed(3);
  return matrix.hit[j] ? `≤ ${(matrix.hi[j] / 1000 + 0.001).toFixed(3)}` : `≥ ${(matrix.lo[j] / 1000).toFixed(3)}`;
}
function detail() {
  if (state.chosen === null) return;
  const matrix = data.matrices[state.chosen], words = ["match", "intruder"], svg = "http://www.w3.org/2000/svg";
  const now = measure(matrix);
  at("detail-title").textContent = matrix.name;
  at("detail-text").textContent = `${matrix.shape.join(" × ")}, rank of the update ${matrix.rank} (effective ` +
    `${matrix.effective.toFixed(1)}), ${span(now.count, now.open)} intruders among the ${state.k} leading vectors with ` +
    `${(100 * now.energy).toFixed(1)} % of their energy; a random direction scores about ${matrix.null.toFixed(3)}.`;
  const table = make("table"), head = make("tr"), thead = make("thead"), body = make("tbody");
  for (const title of ["j", "σ of W", "max cosine", "verdict", "decided by"]) head.append(make("th", title, { scope: "col" }));
  thead.append(head);
  const width = 380, height = 240, left = 34, bottom = 30, top = 10;
  const x = (j) => left + (j + 0.5) * (width - left - 6) / state.k, y = (m) => top + (1 - m) * (height - top - bottom);
  const picture = document.createElementNS(svg, "svg");
  const draw = (tag, attributes, text) => {
    const element = document.createElementNS(svg, tag);
    for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
    if (text !== undefined) element.textContent = text;
    picture.append(element);
  };
  picture.setAttribute("viewBox", `0 0 ${width} ${height}`);
  picture.setAttribute("role", "img");
  picture.setAttribute("aria-label", "Max cosine of each leading vector; the table beside it holds the numbers.");
  for (const m of [0, 0.25, 0.5, 0.75, 1]) {
    draw("line", { class: "axis", x1: left, x2: width - 6, y1: y(m), y2: y(m) });
    draw("text", { x: left - 5, y: y(m) + 4, "text-anchor": "end" }, m);
  }
  draw("line", { class: "null", x1: left, x2: width - 6, y1: y(matrix.null), y2: y(matrix.null) });
  draw("line", { class: "eps", x1: left, x2: width - 6, y1: y(state.E / 1000), y2: y(state.E / 1000) });
  draw("text", { x: width / 2, y: height - 6, "text-anchor": "middle" }, "j, by falling singular value");
  for (let j = 0; j < state.k; j++) {
    const is = verdict(matrix, j, state.E), row = make("tr"), low = matrix.lo[j] / 1000, high = Math.min(matrix.hi[j] / 1000 + 0.001, 1);
    row.append(make("th", j + 1, { scope: "row" }), make("td", Number(matrix.sv[j].toPrecision(5))), make("td", cosine(matrix, j)),
      make("td", (is === null ? "not decided" : words[is]) + (matrix.near[j] && state.E === data.exact ? ", borderline" : "")),
      make("td", matrix.route[j]));
    body.append(row);
    const middle = matrix.m[j] ?? (matrix.hit[j] ? high : low);
    if (matrix.m[j] === null) draw("line", { class: "bound", x1: x(j), x2: x(j), y1: y(low), y2: y(high) });
    if (is === 1) draw("path", { class: "intruder", d: `M${x(j)} ${y(middle) - 5}l5 9h-10z` });
    else draw("circle", { class: "match", cx: x(j), cy: y(middle), r: 4 });
  }
  table.append(thead, body);
  at("vectors").replaceChildren(table);
  at("plot").replaceChildren(picture);
}
function paint() {
  const all = data.matrices.map(measure);
  let count = 0, open = 0;
  for (const one of all) { count += one.count; open += one.open; }
  const vectors = state.k * data.matrices.length;
  at("epsilon-now").textContent = epsilonText();
  at("k-now").textContent = state.k;
  at("epsilon").setAttribute("aria-valuetext", epsilonText());
  let text = `${plural(count, "intruder dimension")} among ${vectors} vectors of ${data.matrices.length} matrices at ε = ${epsilonText()}, k = ${state.k}`;
  if (open) text += `; ${open} more are not decided at this ε: run intruder audit with --epsilon ${state.E / 1000}`;
  at("total").textContent = text + ".";
  paintGrids(all);
  paintTable(all);
  detail();
}
document.querySelectorAll("#matrices thead th").forEach((th, column) => {
  const button = make("button", th.textContent, { type: "button" });
  th.replaceChildren(button);
  button.addEventListener("click", () => {
    const order = th.getAttribute("aria-sort") === "descending" ? "ascending" : "descending";
    document.querySelectorAll("#matrices thead th").forEach((other) => other.removeAttribute("aria-sort"));
    th.setAttribute("aria-sort", order);
    const key = (row) => column === 0 ? row.index : parseFloat(row.cells[column].dataset.value ?? row.cells[column].textContent) || 0;
    const sign = order === "ascending" ? 1 : -1;
    rows.sort((a, b) => sign * (key(a) - key(b)) || a.index - b.index);
    document.querySelector("#matrices tbody").append(...rows);
  });
});
at("filter").addEventListener("input", (event) => {
  for (const row of rows) row.hidden = !data.matrices[row.index].name.toLowerCase().includes(event.target.value.toLowerCase());
});
for (const [id, key, low, high, step] of [["epsilon", "E", data.step, 1000, data.step], ["k", "k", 1, data.k, 1]]) {
  Object.assign(at(id), { min: low, max: high, step: step });
  at(id).value = state[key];
  at(id).addEventListener("input", () => { state[key] = Number(at(id).value); paint(); });
}
at("audited").addEventListener("click", () => {
  state.E = data.E; state.k = data.k;
  at("epsilon").value = state.E; at("k").value = state.k;
  paint();
});
document.querySelector(".controls").addEventListener("submit", (event) => event.preventDefault());
grids();
for (const element of document.querySelectorAll("#map, .controls, .filter")) element.hidden = false;
paint();
