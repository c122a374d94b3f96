"use strict";
// Sorting and filtering; the page says all it has to say without them.
(() => {
  const all = (selector, root = document) => [...root.querySelectorAll(selector)];

  // ------------------------------------------------------------------ sorting

  const key = (row, index) => row.cells[index].dataset.sort;

  function compare(one, other, down) {
    if (one === undefined || other === undefined) return (one === undefined) - (other === undefined); // empty cells last
    const a = Number(one), b = Number(other);
    const order = Number.isNaN(a) || Number.isNaN(b) ? one.localeCompare(other, "en", { numeric: true }) : a - b;
    return down ? -order : order;
  }

  function sort(table, index, head) {
    const down = head.getAttribute("aria-sort") === "ascending";
    for (const one of all("thead th", table)) one.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", down ? "descending" : "ascending");
    const body = table.tBodies[0];
    const rows = [...body.rows].filter((row) => !row.classList.contains("fixed"));
    rows.sort((a, b) => compare(key(a, index), key(b, index), down));
    body.append(...rows);
  }

  for (const table of all("table.sortable")) {
    all("thead th", table).forEach((head, index) => {
      const button = document.createElement("button");
      button.type = "button";
      button.append(...head.childNodes);
      head.append(button);
      button.addEventListener("click", () => sort(table, index, head));
    });
  }

  // ------------------------------------------------------------------ filtering

  const controls = document.getElementById("controls");
  const search = document.getElementById("search");
  const reset = document.getElementById("reset");
  const state = document.getElementById("state");
  const groups = all("fieldset", controls).map((set) => ({ axis: set.dataset.axis, buttons: all("button", set) }));
  const placed = all("[data-at]").map((element) => ({ element, at: JSON.parse(element.dataset.at) }));
  const rows = all("table.sortable tbody tr").filter((row) => !row.classList.contains("fixed"));
  const text = new Map(rows.map((row) => [row, row.textContent.toLowerCase()]));
  const on = (button) => button.getAttribute("aria-pressed") === "true";

  function apply() {
    const wanted = search.value.trim().toLowerCase();
    const chosen = groups.map(({ axis, buttons }) => [axis, new Set(buttons.filter(on).map((b) => b.dataset.value))]);
    const stays = (at) => chosen.every(([axis, values]) => !(axis in at) || values.has(at[axis]));
    for (const { element, at } of placed) element.toggleAttribute("hidden", !stays(at));
    for (const row of rows) if (!text.get(row).includes(wanted)) row.setAttribute("hidden", "");
    if (wanted) for (const row of rows) if (!row.dataset.at && text.get(row).includes(wanted)) row.removeAttribute("hidden");
    const left = rows.filter((row) => !row.hidden).length;
    const narrowed = wanted !== "" || groups.some(({ buttons }) => !buttons.every(on));
    state.textContent = narrowed ? `${left} of ${rows.length} rows` : "";
    reset.disabled = !narrowed;
  }

  for (const { buttons } of groups) {
    for (const button of buttons) {
      button.addEventListener("click", () => {
        if (buttons.every(on)) for (const other of buttons) other.setAttribute("aria-pressed", String(other === button)); // this one alone
        else button.setAttribute("aria-pressed", String(!on(button)));
        if (!buttons.some(on)) for (const other of buttons) other.setAttribute("aria-pressed", "true"); // none means all
        apply();
      });
    }
  }
  search.addEventListener("input", apply);
  reset.addEventListener("click", () => {
    for (const { buttons } of groups) for (const button of buttons) button.setAttribute("aria-pressed", "true");
    search.value = "";
    apply();
  });
  if (rows.length > 1) controls.hidden = false;

  // ------------------------------------------------------------------ printing

  let closed = [];
  window.addEventListener("beforeprint", () => {
    closed = all("main details:not([open])");
    for (const one of closed) one.open = true;
  });
  window.addEventListener("afterprint", () => {
    for (const one of closed) one.open = false;
  });
})();
