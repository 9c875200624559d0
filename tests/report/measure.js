// Added to a page by test_pages_in_a_browser.py, which reads what is found from the document. `act` says what is done.
const actions = {
  nothing: () => {},
  sweep: (found) => {
    const reason = document.querySelector("#leaderboard .reason");
    found.reason = [reason.textContent, reason.getBoundingClientRect().right];
    found.order = () => [...document.querySelectorAll("#leaderboard tbody tr")].map((row) => row.cells[0].dataset.value).join();
    const button = document.querySelectorAll("#leaderboard thead button")[3], head = button.parentElement;
    button.focus();
    button.click();
    found.up = [found.order(), head.getAttribute("aria-sort"), document.activeElement === button];
    button.click();
    found.down = [found.order(), head.getAttribute("aria-sort")];
    found.heat = [...document.querySelectorAll("#heat tbody tr")].map((row) => [...row.cells].map((cell) => cell.textContent));
    by("across").value = 1;
    by("across").dispatchEvent(new Event("input"));
    found.turned = [by("down").value, ...[...document.querySelectorAll("#heat thead th")].map((cell) => cell.textContent)];
    found.caption = by("heat-caption").textContent;
    by("smoothing").value = 0.9;
    by("log").checked = true;
    by("curve").value = "loss";
    by("curve").dispatchEvent(new Event("input"));
    found.lines = document.querySelectorAll("#curves path[d]").length;
    const axis = document.querySelector("#parallel rect"), box = axis.getBoundingClientRect();
    axis.setPointerCapture = () => {};
    axis.dispatchEvent(new PointerEvent("pointerdown", { clientY: box.bottom - 20 }));
    axis.dispatchEvent(new PointerEvent("pointerup", { clientY: box.bottom }));
    found.passing = by("passing").textContent;
    const legend = document.querySelector("#legend button");
    legend.click();
    found.hidden = [legend.getAttribute("aria-pressed"), document.querySelectorAll("#curves path[d]").length];
    location.hash = "#trial:lr=0.001,rank=16";
  },
};
addEventListener("load", () => setTimeout(() => {
  const charts = [...document.querySelectorAll(".chart")].filter((box) => box.clientWidth);
  const found = {
    width: innerWidth,
    content: document.documentElement.scrollWidth,
    ground: getComputedStyle(document.body).backgroundColor,
    empty: charts.filter((box) => !box.querySelector("path[d]")).length,
    charts: document.querySelectorAll(".chart path[d]").length,
    unnamed: document.querySelectorAll("svg:not([aria-label])").length,
  };
  const value = document.querySelector(".tiles dd"), range = document.createRange();
  value.firstChild.data = "1,234,567,890";
  range.selectNode(value.firstChild);
  found.rows = range.getClientRects().length;
  actions[act](found);
  const text = JSON.stringify(found);
  document.body.append(Object.assign(document.createElement("pre"), { id: "found", textContent: text }));
}, 300));
