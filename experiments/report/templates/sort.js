document.querySelectorAll("table.sortable").forEach(function (table) {
  var heads = table.querySelectorAll("thead th"), body = table.tBodies[0];
  heads.forEach(function (head, column) {
    head.querySelector("button").addEventListener("click", function () {
      var words = head.classList.contains("l"), now = head.getAttribute("aria-sort");
      var up = now ? now === "descending" : words;
      heads.forEach(function (other) { other.removeAttribute("aria-sort"); });
      head.setAttribute("aria-sort", up ? "ascending" : "descending");
      var value = function (row) {
        var cell = row.cells[column], sort = cell.dataset.sort, text = cell.textContent;
        if (sort !== undefined) return Number(sort);
        var plain = Number(text.replace("\u2212", "-"));
        return text === "\u2013" ? null : Number.isNaN(plain) ? text : plain;
      };
      var compare = function (a, b) {
        if (a === null || b === null) return a === b ? 0 : a === null ? 1 : -1;
        var less = typeof a === "number" && typeof b === "number" ? a - b
          : String(a).localeCompare(String(b), undefined, {numeric: true});
        return up ? less : -less;
      };
      Array.from(body.rows).sort(function (x, y) { return compare(value(x), value(y)); })
        .forEach(function (row) { body.appendChild(row); });
    });
  });
});
