// A click on a column's title sorts by it; a row that is pointed at shows its lines in the pictures.
for (const th of document.querySelectorAll("th")) th.addEventListener("click", () => {
  const body = th.closest("table").tBodies[0], up = th.getAttribute("aria-sort") !== "ascending";
  const key = (tr) => tr.cells[th.cellIndex].dataset.v ?? tr.cells[th.cellIndex].textContent;
  const order = (a, b) => key(a).localeCompare(key(b), "en", {numeric: true});
  const number = (tr) => key(tr) === "" ? NaN : Number(key(tr));
  const rows = [...body.rows], numeric = rows.every((tr) => key(tr) === "" || !isNaN(number(tr)));
  const missing = (tr) => isNaN(number(tr)) ? 1 : 0;
  rows.sort((a, b) => !numeric ? (up ? order(a, b) : order(b, a))
    : missing(a) - missing(b) || (up ? number(a) - number(b) : number(b) - number(a)) || 0);
  for (const other of th.parentNode.cells) other.removeAttribute("aria-sort");
  th.setAttribute("aria-sort", up ? "ascending" : "descending");
  body.append(...rows);
});
for (const tr of document.querySelectorAll("tr[data-g]")) {
  const point = (on) => {
    document.body.classList.toggle("pointing", on);
    for (const g of document.querySelectorAll(".g" + tr.dataset.g)) g.classList.toggle("on", on);
  };
  tr.addEventListener("mouseenter", () => point(true));
  tr.addEventListener("mouseleave", () => point(false));
}
