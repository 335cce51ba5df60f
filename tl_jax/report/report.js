"use strict";
// Tables that sort and filter, a view that can be linked, plots and who is shown in them.
(() => {
  const collator = new Intl.Collator("en", { numeric: true });
  const tables = [...document.querySelectorAll("main table")];
  const state = {}; // table's id → {column, direction, filter}

  const exact = (cell) => cell.dataset.value ?? cell.textContent;

  function compare(a, b, numeric) {
    const [x, y] = [exact(a), exact(b)];
    if (numeric) return Number(x) - Number(y);
    const [n, m] = [parseFloat(x), parseFloat(y)]; // the collator takes decimals for whole numbers
    return n < m ? -1 : n > m ? 1 : collator.compare(x, y);
  }

  function apply(table) {
    const { column = -1, direction = "ascending", filter = "" } = state[table.id];
    const heads = table.tHead.rows[0].cells;
    [...heads].forEach((head, i) => {
      if (i === column) head.setAttribute("aria-sort", direction);
      else head.removeAttribute("aria-sort");
    });
    const body = table.tBodies[0];
    const rows = [...body.rows].sort((a, b) => a.dataset.place - b.dataset.place);
    if (column >= 0) {
      const numeric = heads[column].classList.contains("number");
      const sign = direction === "descending" ? -1 : 1;
      const empty = (row) => Number(numeric && exact(row.cells[column]) === "");
      rows.sort((a, b) => empty(a) - empty(b)
        || sign * (empty(a) ? 0 : compare(a.cells[column], b.cells[column], numeric)));
    }
    const words = filter.toLowerCase().split(/\s+/).filter(Boolean);
    for (const row of rows) {
      const text = [...row.cells].map((cell) => cell.textContent).join(" ").toLowerCase();
      row.hidden = !words.every((word) => text.includes(word));
    }
    body.append(...rows);
  }

  function remember() {
    const fields = new URLSearchParams();
    for (const [id, { column = -1, direction, filter }] of Object.entries(state)) {
      if (column >= 0) fields.set(`${id}.sort`, `${column}.${direction}`);
      if (filter) fields.set(`${id}.filter`, filter);
    }
    const address = location.href.split("#")[0];
    history.replaceState(null, "", fields.size ? `${address}#${fields}` : address);
  }

  function restore() {
    const fragment = location.hash.slice(1);
    if (fragment && !fragment.includes("=")) return; // a link to a section
    const fields = new URLSearchParams(fragment);
    for (const table of tables) {
      const [column, direction] = (fields.get(`${table.id}.sort`) ?? "").split(".");
      const known = /^\d+$/.test(column) && Number(column) < table.tHead.rows[0].cells.length;
      state[table.id] = {
        column: known ? Number(column) : -1,
        direction: direction === "descending" ? "descending" : "ascending",
        filter: fields.get(`${table.id}.filter`) ?? "",
      };
      table.filterBox.value = state[table.id].filter;
      apply(table);
    }
  }

  function prepare(table) {
    state[table.id] = {};
    [...table.tBodies[0].rows].forEach((row, i) => { row.dataset.place = i; });
    [...table.tHead.rows[0].cells].forEach((head, i) => {
      const button = document.createElement("button");
      button.type = "button";
      button.textContent = head.textContent;
      button.addEventListener("click", () => {
        const own = state[table.id];
        // Numbers are mostly wanted from the highest down, words from A on.
        const first = head.classList.contains("number") ? "descending" : "ascending";
        const other = first === "descending" ? "ascending" : "descending";
        if (own.column !== i) [own.column, own.direction] = [i, first];
        else if (own.direction === first) own.direction = other;
        else own.column = -1;
        apply(table);
        remember();
      });
      head.replaceChildren(button);
    });
    table.filterBox = document.createElement("input");
    if (table.tBodies[0].rows.length <= 10) return; // all in sight
    const label = document.createElement("label");
    label.className = "filter";
    label.append("Filter ");
    table.filterBox.type = "search";
    table.filterBox.addEventListener("input", () => {
      state[table.id].filter = table.filterBox.value;
      apply(table);
      remember();
    });
    label.append(table.filterBox);
    table.parentElement.before(label);
  }

  function toggle(button) {
    const shown = button.getAttribute("aria-pressed") !== "true";
    button.setAttribute("aria-pressed", String(shown));
    for (const place of Bokeh.documents) {
      for (const model of place.all_models) {
        if (model.name === button.dataset.style) model.visible = shown;
      }
    }
  }

  tables.forEach(prepare);
  restore();
  addEventListener("hashchange", restore);
  for (const button of document.querySelectorAll(".key button")) {
    button.addEventListener("click", () => toggle(button));
  }
  const plots = JSON.parse(document.getElementById("plots").textContent);
  Promise.all(plots.map((item) => Bokeh.embed.embed_item(item)))
    .then(() => { document.body.dataset.plots = "drawn"; });
})();
