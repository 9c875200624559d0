"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const by = (id) => document.getElementById(id);
// Plotly's default toolbar has a button that uploads the chart; results stay here.
const options = { responsive: true, displaylogo: false, showSendToCloud: false, modeBarButtonsToRemove: ["select2d", "lasso2d"] };

// Exponential moving average, its start corrected as in Adam, so that the first points aren't pulled to zero.
function smooth(values, weight) {
  let mean = 0;
  return values.map((value, i) => {
    mean = weight * mean + (1 - weight) * value;
    return mean / (1 - weight ** (i + 1));
  });
}

function drawCurves() {
  const curve = by("curve").value, over = by("over").value, weight = Number(by("smoothing").value);
  by("smoothed").textContent = weight;
  const traces = [];
  for (const trial of data.trials) {
    const points = trial.series[curve];
    if (!points.value.length) continue;
    const common = { x: points[over], type: "scatter", mode: points.value.length < 30 ? "lines+markers" : "lines",
                     legendgroup: trial.name };
    if (weight > 0) {  // the measured values stay visible, faintly
      traces.push({ ...common, y: points.value, line: { color: trial.color, width: 1 }, opacity: 0.25,
                    showlegend: false, hoverinfo: "skip" });
    }
    traces.push({ ...common, y: smooth(points.value, weight), name: trial.name, line: { color: trial.color, width: 2 },
                  showlegend: true, hovertemplate: "%{y:.5g}" });
  }
  Plotly.react("curves", traces, {
    template: "plotly_white", hovermode: "x unified", uirevision: `${curve} ${over} ${by("log").checked}`,
    font: { family: "system-ui, sans-serif" }, margin: { t: 35, r: 10, b: 50, l: 60 },
    xaxis: { title: { text: over }, gridcolor: "#e8edf2" },
    yaxis: { title: { text: curve }, type: by("log").checked ? "log" : "linear", gridcolor: "#e8edf2" },
  }, options);
}

// Click on a heading: sort by that column; again: the other way. Cells without a value stay last.
function sortable(table) {
  const heads = [...table.tHead.rows[0].cells];
  const number = (text) => (text === "" || text === "None" ? NaN : Number(text));
  heads.forEach((head, column) => head.addEventListener("click", () => {
    const down = head.getAttribute("aria-sort") === "ascending";
    heads.forEach((other) => other.removeAttribute("aria-sort"));
    head.setAttribute("aria-sort", down ? "descending" : "ascending");
    const key = (row) => row.cells[column].dataset.value ?? row.cells[column].textContent.trim();
    const rows = [...table.tBodies[0].rows].sort((a, b) => {
      const [x, y] = [key(a), key(b)], [m, n] = [number(x), number(y)];
      if (Number.isNaN(m) !== Number.isNaN(n)) return Number.isNaN(m) ? 1 : -1;
      const order = Number.isNaN(m) ? x.localeCompare(y, undefined, { numeric: true }) : m - n;
      return down ? -order : order;
    });
    table.tBodies[0].append(...rows);
  }));
}

for (const name of data.curves) by("curve").add(new Option(name, name));
for (const id of ["curve", "over", "log", "smoothing"]) by(id).addEventListener("input", drawCurves);
drawCurves();
for (const [id, figure] of Object.entries(data.figures)) Plotly.newPlot(id, figure.data, figure.layout, options);
document.querySelectorAll("table.sortable").forEach(sortable);
document.querySelectorAll("button.copy").forEach((button) => button.addEventListener("click", async () => {
  await navigator.clipboard.writeText(button.previousElementSibling.textContent);
  button.textContent = "copied";
}));
// A link to a run opens it.
const open = () => { const run = by(decodeURIComponent(location.hash.slice(1))); if (run?.tagName === "DETAILS") run.open = true; };
addEventListener("hashchange", open);
open();
