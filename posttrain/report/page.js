"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const by = (id) => document.getElementById(id);
const tip = by("tip");

// ---- Elements, numbers, scales

function svg(name, attributes = {}, text = "") {
  const node = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  node.textContent = text;
  return node;
}

function html(name, properties = {}, ...children) {
  const node = Object.assign(document.createElement(name), properties);
  node.append(...children);
  return node;
}

function format(value) {
  if (value === null || value === undefined) return "–";
  if (Number.isInteger(value) && Math.abs(value) < 1e9) return value.toLocaleString("en");
  const size = Math.abs(value);
  if (size >= 1e4 && size < 1e9) return Math.round(value).toLocaleString("en");
  if (size !== 0 && (size < 1e-3 || size >= 1e9)) return value.toExponential(2).replace(/\.?0+e/, "e");
  return String(Number(value.toPrecision(4)));
}

// A scale from values to pixels, with its ticks; logarithmic where asked and all values are positive.
function scale(values, from, to, log = false) {
  let low = Infinity, high = -Infinity;
  for (const value of values) {
    if (log && value <= 0) continue;
    low = Math.min(low, value);
    high = Math.max(high, value);
  }
  if (low > high) [low, high] = log ? [0.1, 1] : [0, 1];
  if (low === high) [low, high] = log ? [low / 2, high * 2] : [low - (Math.abs(low) || 1) / 2, high + (Math.abs(high) || 1) / 2];
  const bend = log ? Math.log10 : Number;
  const place = (value) => from + (to - from) * (bend(value) - bend(low)) / (bend(high) - bend(low));
  return { place, low, high, ticks: log ? logTicks(low, high) : linearTicks(low, high) };
}

function linearTicks(low, high, about = 6) {
  const rough = (high - low) / about, power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((factor) => factor * power).find((each) => each >= rough * 0.999);
  const ticks = [];
  for (let i = Math.ceil(low / step - 1e-9); i * step <= high + step * 1e-9; i++) ticks.push(Number((i * step).toPrecision(12)));
  return ticks;
}

function logTicks(low, high) {
  const decades = Math.log10(high / low);
  const factors = decades < 0.5 ? [1, 1.5, 2, 3, 4, 5, 6, 7, 8, 9] : decades < 3 ? [1, 2, 5] : [1];
  const ticks = [];
  for (let power = Math.floor(Math.log10(low)); power <= Math.log10(high); power++) {
    for (const factor of factors) {
      const tick = factor * 10 ** power;
      if (tick >= low && tick <= high) ticks.push(tick);
    }
  }
  return ticks;
}

// Exponential moving average, its start corrected as in Adam, so that the first points aren't pulled to zero.
function smooth(values, weight) {
  let mean = 0;
  return values.map((value, i) => {
    mean = weight * mean + (1 - weight) * value;
    return mean / (1 - weight ** (i + 1));
  });
}

function showTip(event, text) {
  tip.textContent = text;
  tip.hidden = !text;
  if (!text) return;
  const width = tip.offsetWidth, left = event.clientX + 14;
  tip.style.left = `${left + width > innerWidth - 8 ? Math.max(8, event.clientX - 14 - width) : left}px`;
  tip.style.top = `${Math.min(event.clientY + 14, innerHeight - tip.offsetHeight - 8)}px`;
}

// ---- Line charts

// Draws lines of {name, color, x, y, raw, dots, href} into a box; zooms where it is dragged across.
class LineChart {
  constructor(box) {
    this.box = box;
    this.hidden = new Set();
    this.zoom = null;
    new ResizeObserver(() => requestAnimationFrame(() => this.draw())).observe(box);
  }

  show(lines, options) {
    if (options.x !== this.options?.x) this.zoom = null;
    this.lines = lines;
    this.options = options;
    this.draw();
  }

  draw() {
    const width = this.box.clientWidth, height = this.box.clientHeight;
    if (!this.lines || !width) return;
    const { x: across, y: up, log, label } = this.options;
    const lines = this.lines.filter((line) => !this.hidden.has(line.name));
    const inside = (x) => !this.zoom || (x >= this.zoom[0] && x <= this.zoom[1]);
    const xs = [], ys = [];
    for (const line of lines) {
      line.x.forEach((x, i) => {
        if (!inside(x)) return;
        xs.push(x);
        ys.push(line.y[i]);
      });
    }
    const left = 60, right = width - 12, top = 12, bottom = height - 38;
    const x = scale(this.zoom ?? xs, left, right), y = scale(ys, bottom, top, log);
    const picture = svg("svg", { width, height, role: "img", "aria-label": label });
    for (const tick of y.ticks) {
      picture.append(svg("line", { class: "grid", x1: left, x2: right, y1: y.place(tick), y2: y.place(tick) }));
      picture.append(svg("text", { x: left - 7, y: y.place(tick) + 4, "text-anchor": "end" }, format(tick)));
    }
    for (const tick of x.ticks) {
      picture.append(svg("text", { x: x.place(tick), y: bottom + 17, "text-anchor": "middle" }, format(tick)));
    }
    picture.append(svg("line", { class: "axis", x1: left, x2: right, y1: bottom, y2: bottom }));
    picture.append(svg("text", { x: (left + right) / 2, y: height - 4, "text-anchor": "middle" }, across));
    picture.append(svg("text", { x: 4, y: top - 1, "text-anchor": "start", class: "name" }, up));
    if (!xs.length) picture.append(svg("text", { x: (left + right) / 2, y: (top + bottom) / 2, "text-anchor": "middle" }, "nothing to show"));
    this.points = [];
    for (const line of [...lines].reverse()) this.drawLine(picture, line, x, y, inside, log);
    this.brush = svg("rect", { class: "brush", y: top, height: bottom - top, width: 0, x: left });
    picture.append(this.brush);
    picture.addEventListener("pointermove", (event) => this.hover(event, x));
    picture.addEventListener("pointerdown", (event) => (this.pressed = this.pixel(event)));
    picture.addEventListener("pointerup", (event) => this.release(event, [left, right], x));
    picture.addEventListener("pointerleave", () => { this.pressed = null; this.light(null); showTip(null, ""); });
    picture.addEventListener("dblclick", () => { this.zoom = null; this.draw(); });
    this.box.replaceChildren(picture);
  }

  drawLine(picture, line, x, y, inside, log) {
    let path = "", pen = "M";
    line.x.forEach((value, i) => {
      if (!inside(value) || (log && line.y[i] <= 0)) { pen = "M"; return; }
      const [px, py] = [x.place(value), y.place(line.y[i])];
      path += line.steps && pen === "L" ? `H${px.toFixed(1)}V${py.toFixed(1)}` : `${pen}${px.toFixed(1)} ${py.toFixed(1)}`;
      pen = "L";
      if (!line.raw) this.points.push({ line, px, py, x: value, y: line.y[i] });
    });
    const node = svg("path", { d: line.dots === "only" ? "" : path, class: line.raw ? "raw" : "" });
    node.style.stroke = line.color;
    if (!line.raw) line.node = node;
    picture.append(node);
    if (!line.dots) return;
    for (const point of this.points.filter((each) => each.line === line)) {
      const dot = svg("circle", { cx: point.px, cy: point.py, r: 3.2 });
      dot.style.fill = line.colors?.[line.x.indexOf(point.x)] ?? line.color;
      picture.append(dot);
    }
  }

  pixel(event) {
    return event.clientX - this.box.getBoundingClientRect().left;
  }

  hover(event) {
    const frame = this.box.getBoundingClientRect(), px = event.clientX - frame.left, py = event.clientY - frame.top;
    if (this.pressed !== null && this.pressed !== undefined) {
      this.brush.setAttribute("x", Math.min(px, this.pressed));
      this.brush.setAttribute("width", Math.abs(px - this.pressed));
    }
    let nearest = null, least = 60 ** 2;
    for (const point of this.points) {
      const distance = (point.px - px) ** 2 + (point.py - py) ** 2;
      if (distance < least) [nearest, least] = [point, distance];
    }
    this.light(nearest?.line);
    const name = nearest?.line.names?.[nearest.line.x.indexOf(nearest.x)] ?? nearest?.line.name;
    showTip(event, nearest ? `${name}\n${this.options.x} ${format(nearest.x)}: ${format(nearest.y)}` : "");
  }

  light(line) {
    for (const each of this.lines) each.node?.classList.toggle("lit", each === line && this.lines.length > 1);
  }

  release(event, [left, right], x) {
    const [from, to] = [this.pressed, this.pixel(event)].sort((a, b) => a - b);
    this.pressed = null;
    if (!(to - from > 8)) { this.brush.setAttribute("width", 0); return; }
    const value = (px) => x.low + (x.high - x.low) * (Math.min(Math.max(px, left), right) - left) / (right - left);
    this.zoom = [value(from), value(to)];
    this.draw();
  }
}

// A button for each line that hides and shows it.
function legend(box, chart, lines) {
  const names = lines.filter((line) => !line.raw);
  box.replaceChildren(...names.map((line) => {
    const dot = html("span", { className: "dot" });
    dot.style.background = line.color;
    const button = html("button", { type: "button" }, dot, line.name);
    button.setAttribute("aria-pressed", String(!chart.hidden.has(line.name)));
    button.addEventListener("click", () => {
      const shown = chart.hidden.delete(line.name);
      if (!shown) chart.hidden.add(line.name);
      button.setAttribute("aria-pressed", String(shown));
      chart.draw();
    });
    return button;
  }));
}

// The lines of one curve of a trial: smoothed, and the measured values faintly behind.
function linesOf(trial, curve, color, name, over, weight) {
  const table = trial.curves.find((each) => curve in each.values);
  if (!table?.[over]) return [];
  const line = { name, color, x: table[over], y: table.values[curve], dots: table.step.length < 30 ? "too" : "" };
  if (!weight) return [line];
  return [{ ...line, y: smooth(line.y, weight) }, { ...line, raw: true, dots: "" }];
}

function controls() {
  const weight = Number(by("smoothing").value);
  by("smoothed").textContent = weight;
  return { over: by("over").value, log: by("log").checked, weight };
}

// ---- Tables that are sorted by a button in each heading; cells without a value stay last

function sortable(table) {
  const heads = [...table.tHead.rows[0].cells];
  const number = (text) => (text.trim() === "" ? NaN : Number(text));
  heads.forEach((head, column) => head.querySelector("button").addEventListener("click", () => {
    const down = head.getAttribute("aria-sort") === "ascending";
    heads.forEach((other) => other.setAttribute("aria-sort", "none"));
    head.setAttribute("aria-sort", down ? "descending" : "ascending");
    const key = (row) => row.cells[column].dataset.value ?? row.cells[column].textContent.trim();
    const empty = (text) => text === "";
    const rows = [...table.tBodies[0].rows].sort((a, b) => {
      const [x, y] = [key(a), key(b)], [m, n] = [number(x), number(y)];
      if (empty(x) !== empty(y)) return empty(x) ? 1 : -1;
      if (Number.isNaN(m) !== Number.isNaN(n)) return Number.isNaN(m) ? 1 : -1;
      const order = Number.isNaN(m) ? x.localeCompare(y, undefined, { numeric: true }) : m - n;
      return down ? -order : order;
    });
    table.tBodies[0].append(...rows);
  }));
}

// ---- The page of a sweep

const link = (trial) => `#${encodeURIComponent(`trial:${trial.id}`)}`;
const called = (trial) => `${trial.rank}  ${trial.name}`;

function curvesOfSweep() {
  const chart = new LineChart(by("curves")), few = data.trials.length <= 10;
  for (const name of data.curves) by("curve").add(new Option(name, name));
  const draw = () => {
    const curve = by("curve").value, { over, log, weight } = controls();
    const lines = data.trials.flatMap((trial) => linesOf(trial, curve, trial.color, called(trial), over, weight));
    chart.show(lines, { x: over, y: curve, log, label: `${curve} of ${data.trials.length} trials over ${over}` });
    if (few) legend(by("legend"), chart, lines);
  };
  if (!few) by("legend").append("best", html("span", { className: "ramp" }), "worst");
  for (const id of ["curve", "over", "log", "smoothing"]) by(id).addEventListener("input", draw);
  draw();
  return chart;
}

function historyOfSweep() {
  if (!data.history.length) { by("history").remove(); return; }
  const trials = data.history.map((each) => data.trials[each.trial]), x = trials.map((_, i) => i + 1);
  new LineChart(by("history")).show([
    { name: "best so far", color: "var(--accent)", x, y: data.history.map((each) => each.best), steps: true },
    { name: "trial", color: "var(--soft)", x, y: trials.map((trial) => trial.score), dots: "only",
      colors: trials.map((trial) => trial.color), names: trials.map(called) },
  ], { x: "trials, as started", y: data.metric, log: false, label: `best ${data.metric} after each trial` });
}

// Of the trials in a cell the best is shown; trials come best first.
function heatOfSweep() {
  const results = data.results, keys = data.keys.filter((axis) => axis.bins.length > 1);
  if (keys.length < 2 || !results.length) return;
  by("heat-section").hidden = false;
  keys.forEach((axis, i) => {
    for (const id of ["across", "down"]) by(id).add(new Option(axis.label, i));
  });
  results.forEach((axis, i) => by("shade").add(new Option(axis.label, i)));
  by("across").value = 0;
  by("down").value = 1;
  const draw = (event) => {
    if (by("across").value === by("down").value) {  // the other one makes way
      const other = by(event.target.id === "across" ? "down" : "across");
      other.value = by("across").value === "0" ? 1 : 0;
    }
    const across = keys[by("across").value], down = keys[by("down").value], shade = results[by("shade").value];
    const cells = new Map();
    data.shown.forEach((rank, i) => {
      const cell = `${down.places[i]} ${across.places[i]}`;
      if (!cells.has(cell)) cells.set(cell, { trial: data.trials[rank], index: i, count: 0 });
      cells.get(cell).count += 1;
    });
    const head = html("tr", {}, html("th", { scope: "col" }, `${down.label} ↓  ${across.label} →`));
    for (const text of across.bins) head.append(html("th", { scope: "col" }, text));
    const body = down.bins.map((text, row) => {
      const line = html("tr", {}, html("th", { scope: "row" }, text));
      across.bins.forEach((_, column) => line.append(heatCell(cells.get(`${row} ${column}`), shade)));
      return line;
    });
    by("heat").replaceChildren(html("table", { className: "heat" }, html("thead", {}, head), html("tbody", {}, ...body)));
    const full = cells.size, all = across.bins.length * down.bins.length;
    const best = [...cells.values()].find((cell) => cell.trial === data.trials[data.best]);
    by("heat-caption").textContent = `${shade.label} of the best trial in each cell; ${full} of ${all} cells were tried.`
      + (best ? ` The best trial is at ${across.label} ${across.bins[across.places[best.index]]}, ${down.label} ${down.bins[down.places[best.index]]}: ${format(shade.values[best.index])}.` : "");
  };
  for (const id of ["across", "down", "shade"]) by(id).addEventListener("input", draw);
  draw();
}

function heatCell(cell, shade) {
  if (!cell) return html("td", { className: "none" }, "–");
  const value = shade.values[cell.index];
  if (value === null) return html("td", { className: "none" }, html("a", { href: link(cell.trial) }, cell.trial.state));
  const node = html("td", {}, html("a", { href: link(cell.trial), title: `${called(cell.trial)}, best of ${cell.count}` }, format(value)));
  const good = shade.up ? shade.positions[cell.index] : 1 - shade.positions[cell.index];
  node.style.setProperty("--share", `${Math.round(100 * (1 - good))}%`);
  if (cell.trial === data.trials[data.best]) node.classList.add("top");
  return node;
}

// One vertical axis per key and result; what is dragged over an axis keeps the lines that pass there.
function parallelOfSweep() {
  const axes = [...data.keys, ...data.results.filter((axis) => axis.parallel)];
  if (axes.length < 2 || data.shown.length < 2) return;
  by("parallel-section").hidden = false;
  const box = by("parallel"), kept = new Map();
  const draw = () => {
    const gap = Math.max(110, (box.clientWidth - 150) / (axes.length - 1)), width = gap * (axes.length - 1) + 150, height = 330;
    const top = 44, bottom = height - 14, y = (position) => bottom - position * (bottom - top), x = (i) => 60 + i * gap;
    const picture = svg("svg", { width, height, role: "img", "aria-label": `${data.shown.length} trials over ${axes.map((axis) => axis.label).join(", ")}` });
    const passes = (i) => [...kept].every(([axis, [low, high]]) => {
      const position = axes[axis].positions[i];
      return position !== null && position >= low && position <= high;
    });
    let count = 0;
    [...data.shown.keys()].reverse().forEach((i) => {
      const trial = data.trials[data.shown[i]];
      let path = "", pen = "M";
      axes.forEach((axis, a) => {
        if (axis.positions[i] === null) { pen = "M"; return; }
        path += `${pen}${x(a).toFixed(1)} ${y(axis.positions[i]).toFixed(1)}`;
        pen = "L";
      });
      const line = svg("path", { d: path, class: passes(i) ? "" : "dim" });
      line.style.stroke = trial.color;
      if (passes(i)) {
        count += 1;
        line.append(svg("title", {}, `${called(trial)}: ${format(trial.score)}`));
        line.addEventListener("pointerenter", () => line.classList.add("lit"));
        line.addEventListener("pointerleave", () => line.classList.remove("lit"));
      }
      picture.append(line);
    });
    axes.forEach((axis, a) => {
      picture.append(svg("line", { class: "axis", x1: x(a), x2: x(a), y1: top, y2: bottom }));
      picture.append(svg("text", { x: x(a), y: 16, "text-anchor": "middle" }, axis.label.length > 16 ? `${axis.label.slice(0, 15)}…` : axis.label));
      let last = Infinity;
      for (const [position, text] of axis.ticks) {
        if (last - y(position) < 13) continue;  // no room
        last = y(position);
        picture.append(svg("text", { x: x(a) + 6, y: y(position) + 4 }, text.length > 14 ? `${text.slice(0, 13)}…` : text));
      }
      if (kept.has(a)) {
        const [low, high] = kept.get(a);
        picture.append(svg("rect", { class: "brush", x: x(a) - 9, width: 18, y: y(high), height: Math.max(2, y(low) - y(high)) }));
      }
      picture.append(grip(a, x(a), top, bottom));
    });
    by("passing").textContent = kept.size ? `${count} of ${data.shown.length} trials pass.` : "";
    box.replaceChildren(picture);
  };
  const grip = (axis, x, top, bottom) => {
    const area = svg("rect", { x: x - 14, width: 28, y: top - 8, height: bottom - top + 16, fill: "transparent", style: "cursor: ns-resize" });
    const at = (event) => (bottom - (event.clientY - box.getBoundingClientRect().top)) / (bottom - top);
    let from = null;
    area.addEventListener("pointerdown", (event) => { from = at(event); area.setPointerCapture(event.pointerId); });
    area.addEventListener("pointerup", (event) => {
      if (from === null) return;
      const ends = [from, at(event)].sort((a, b) => a - b);
      if (ends[1] - ends[0] > 0.02) kept.set(axis, [ends[0] - 0.01, ends[1] + 0.01]);
      from = null;
      draw();
    });
    area.addEventListener("dblclick", () => { kept.delete(axis); draw(); });
    return area;
  };
  draw();
  new ResizeObserver(() => requestAnimationFrame(draw)).observe(box);
}

// ---- The page of one run

function curvesOfRun() {
  const [trial] = data.trials, charts = [...document.querySelectorAll("[data-chart]")].map((box) => [box, new LineChart(box)]);
  const draw = () => {
    const { over, log, weight } = controls();
    for (const [box, chart] of charts) {
      const names = data.charts[box.dataset.chart];
      const lines = names.flatMap((name, i) => linesOf(trial, name, `var(--hue-${i})`, name, over, weight));
      chart.show(lines, { x: over, y: "", log, label: `${names.join(", ")} over ${over}` });
      if (names.length > 1) legend(box.nextElementSibling, chart, lines);
    }
  };
  for (const id of ["over", "log", "smoothing"]) by(id).addEventListener("input", draw);
  draw();
}

if (data.kind === "sweep") {
  document.querySelectorAll("table.sortable").forEach(sortable);
  curvesOfSweep();
  historyOfSweep();
  heatOfSweep();
  parallelOfSweep();
} else if (data.charts.length) {
  curvesOfRun();
}
document.querySelectorAll("button.copy").forEach((button) => button.addEventListener("click", async () => {
  await navigator.clipboard.writeText(button.previousElementSibling.textContent);
  button.textContent = "copied";
}));
// A link to a trial opens it.
const open = () => {
  const trial = by(decodeURIComponent(location.hash.slice(1)));
  if (trial?.tagName !== "DETAILS") return;
  trial.open = true;
  trial.scrollIntoView();
};
addEventListener("hashchange", open);
open();
