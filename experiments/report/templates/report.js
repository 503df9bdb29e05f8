"use strict";
(function () {
  var MINUS = "\u2212", MISSING = "\u2013", FILTER_FROM = 6, SHORT = 12;
  var tip = document.getElementById("tip");

  function make(name, attributes, text) {
    var made = document.createElement(name);
    Object.keys(attributes || {}).forEach(function (key) { made.setAttribute(key, attributes[key]); });
    if (text) made.textContent = text;
    return made;
  }
  function number(value) {
    if (typeof value !== "number") return value === null ? MISSING : String(value);
    return String(Number(value.toPrecision(4))).replace("-", MINUS);
  }
  function save(name, kind, text) {
    var link = make("a", {download: name, href: URL.createObjectURL(new Blob([text], {type: kind}))});
    link.click();
    setTimeout(function () { URL.revokeObjectURL(link.href); }, 1000);
  }
  function csv(rows) {
    return rows.map(function (row) {
      return row.map(function (cell) {
        var text = cell === null || cell === undefined ? "" : String(cell);
        return /[",\n]/.test(text) ? '"' + text.replace(/"/g, '""') + '"' : text;
      }).join(",");
    }).join("\n") + "\n";
  }

  // -- tables: sort, filter, CSV, rows that open -------------------------------------------------
  function own(table) {
    return Array.from(table.tBodies[0].rows).filter(function (row) { return !row.classList.contains("opened"); });
  }
  function close(table) {
    table.querySelectorAll("tr.opened").forEach(function (row) { row.remove(); });
    table.querySelectorAll("button.open").forEach(function (b) { b.setAttribute("aria-expanded", "false"); });
  }
  function sortable(table) {
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
          var plain = Number(text.replace(MINUS, "-"));
          return text === MISSING ? null : Number.isNaN(plain) ? text : plain;
        };
        var compare = function (a, b) {
          if (a === null || b === null) return a === b ? 0 : a === null ? 1 : -1;
          var less = typeof a === "number" && typeof b === "number" ? a - b
            : String(a).localeCompare(String(b), undefined, {numeric: true});
          return up ? less : -less;
        };
        close(table);
        own(table).sort(function (x, y) { return compare(value(x), value(y)); })
          .forEach(function (row) { body.appendChild(row); });
        if (table.classList.contains("many")) shorten(table);
      });
    });
  }
  function shorten(table) {  // the first rows in their order; the others on request
    own(table).forEach(function (row, i) { row.classList.toggle("more", i >= SHORT); });
  }
  function tools(table, place) {
    var bar = make("div", {"class": "tools"}), rows = own(table);
    var many = table.classList.contains("many") && rows.length > SHORT + 3;
    if (rows.length >= FILTER_FROM) {
      var label = make("label", {}, "Filter "), field = make("input", {type: "search", autocomplete: "off"});
      var told = make("span", {"class": "told", role: "status"}), all = false;
      var whole = function () {
        return many ? "showing " + (all ? rows.length : SHORT) + " of " + rows.length : "";
      };
      told.textContent = whole();
      field.addEventListener("input", function () {
        var wanted = field.value.toLowerCase().split(/\s+/).filter(Boolean), shown = 0;
        close(table);
        rows.forEach(function (row) {
          var text = row.textContent.toLowerCase();
          row.hidden = !wanted.every(function (word) { return text.indexOf(word) >= 0; });
          shown += row.hidden ? 0 : 1;
        });
        table.classList.toggle("short", many && !wanted.length && !all);
        told.textContent = wanted.length ? "showing " + shown + " of " + rows.length : whole();
      });
      label.appendChild(field);
      bar.append(label, told);
      if (many) {
        var more = make("button", {type: "button", "aria-expanded": "false"}, "Show all");
        more.addEventListener("click", function () {
          all = !all;
          close(table);
          table.classList.toggle("short", !all);
          more.textContent = all ? "Show fewer" : "Show all";
          more.setAttribute("aria-expanded", String(all));
          field.value = "";
          field.dispatchEvent(new Event("input"));
        });
        bar.append(more);
        shorten(table);
        table.classList.add("short");
      }
    }
    var button = make("button", {type: "button"}, "CSV");
    button.setAttribute("aria-label", "CSV of this table");
    button.addEventListener("click", function () {
      var lines = [table.tHead.rows[0]].concat(own(table).filter(function (row) { return !row.hidden; }));
      save("table-" + (place + 1) + ".csv", "text/csv", csv(lines.map(function (row) {
        return Array.from(row.cells).map(function (c) {
          return c.dataset.sort !== undefined ? c.dataset.sort : c.textContent.trim();
        });
      })));
    });
    bar.append(button);
    table.closest(".scroll").before(bar);
  }
  document.querySelectorAll("table.sortable").forEach(function (table, place) {
    sortable(table);
    if (!table.classList.contains("small")) tools(table, place);
  });
  document.querySelectorAll("button.open").forEach(function (button) {
    button.addEventListener("click", function () {
      var row = button.closest("tr"), next = row.nextElementSibling;
      if (button.getAttribute("aria-expanded") === "true") {
        next.remove();
        button.setAttribute("aria-expanded", "false");
        return;
      }
      var from = document.getElementById(button.dataset.opens), inside = make("div", {});
      Array.from(from.children).slice(1).forEach(function (part) {
        var copy = part.cloneNode(true);
        copy.querySelectorAll("thead button").forEach(function (b) { b.replaceWith(b.textContent); });
        inside.appendChild(copy);
      });
      var opened = make("tr", {"class": "opened"});
      opened.appendChild(make("td", {colspan: row.cells.length, "class": "l"})).appendChild(inside);
      row.after(opened);
      button.setAttribute("aria-expanded", "true");
    });
  });

  // -- figures: what stands where the pointer is, by mouse, finger or arrow keys -----------------
  function between(value, ends) { return ends[0] + value * (ends[1] - ends[0]); }
  function nearest(list, value) {
    var best = 0;
    list.forEach(function (x, i) { if (Math.abs(x - value) < Math.abs(list[best] - value)) best = i; });
    return best;
  }
  function inside(edges, value) {
    for (var i = 0; i + 1 < edges.length; i++) {
      if ((value - edges[i]) * (value - edges[i + 1]) <= 0) return i;
    }
    return -1;
  }
  function words(panel, u, v) {  // u, v: place in the panel, from the left and from the top
    var x = between(u, panel.x), y = between(1 - v, panel.y), row, at;
    if (panel.kind === "map") {
      row = inside(panel.rows, y);
      at = inside(panel.columns, x);
      if (row < 0 || at < 0) return null;
      return [panel.series[row].name + " \u00d7 " + panel.series[row].x[at] + ": " + number(panel.series[row].y[at])];
    }
    if (panel.kind === "bars" || panel.kind === "columns") {
      at = nearest(panel.rows, panel.kind === "bars" ? y : x);
      var name = panel.series[0].x[nearestName(panel, at)];
      return [name].concat(panel.series.map(function (s) {
        var i = s.x.indexOf(name);
        return i < 0 ? null : s.name + ": " + number(s.y[i]);
      }).filter(Boolean));
    }
    var steps = panel.series[0].x, i = nearest(steps, x);
    return [(panel.xlabel || "x") + " " + number(steps[i])].concat(panel.series.map(function (s) {
      var j = nearest(s.x, steps[i]);
      return s.name + ": " + number(s.y[j]);
    }));
  }
  // Bars of one set stand in the order of their ticks or against it; the nearest tick names them.
  function nearestName(panel, tick) {
    var order = panel.rows.map(function (p, i) { return i; });
    return Math.min(order.indexOf(tick), panel.series[0].x.length - 1);
  }
  function show(lines, left, top) {
    tip.textContent = "";
    lines.forEach(function (line, i) { tip.appendChild(make(i ? "div" : "b", {}, line)); });
    tip.hidden = false;
    var wide = document.documentElement.clientWidth;
    tip.style.left = Math.max(4, Math.min(left + 14, wide - tip.offsetWidth - 6)) + "px";
    tip.style.top = (top + 16 + tip.offsetHeight > window.innerHeight ? top - tip.offsetHeight - 10 : top + 16) + "px";
  }
  function hide() { tip.hidden = true; }
  document.querySelectorAll("figure.plot").forEach(function (figure) {
    var panels = JSON.parse(figure.querySelector("script").textContent), name = figure.dataset.name;
    var canvas = figure.querySelector(".canvas"), svg = canvas.querySelector("svg");
    var cross = make("span", {"class": "cross", hidden: ""}), place = {panel: 0, u: 0, v: 0};
    canvas.appendChild(cross);
    canvas.tabIndex = 0;
    canvas.setAttribute("role", "group");
    canvas.setAttribute("aria-label", "Figure " + name + ": arrow keys read its numbers");
    function at(panel, u, v) {
      var box = svg.getBoundingClientRect(), frame = canvas.getBoundingClientRect(), lines = words(panel, u, v);
      if (!lines) { leave(); return; }
      var left = box.left + (panel.box[0] + u * panel.box[2]) * box.width;
      var top = box.top + (panel.box[1] + v * panel.box[3]) * box.height;
      cross.hidden = false;
      cross.style.left = (left - frame.left) + "px";
      cross.style.top = (box.top - frame.top + panel.box[1] * box.height) + "px";
      cross.style.height = panel.box[3] * box.height + "px";
      cross.classList.toggle("dot", panel.kind !== "lines");
      if (panel.kind !== "lines") { cross.style.top = (top - frame.top) + "px"; cross.style.height = ""; }
      show((panels.length > 1 && panel.name ? [panel.name] : []).concat(lines), left, top);
    }
    function leave() { hide(); cross.hidden = true; }
    canvas.addEventListener("pointermove", function (event) {
      var box = svg.getBoundingClientRect();
      var x = (event.clientX - box.left) / box.width, y = (event.clientY - box.top) / box.height;
      var found = panels.findIndex(function (p) {
        return x >= p.box[0] && x <= p.box[0] + p.box[2] && y >= p.box[1] && y <= p.box[1] + p.box[3];
      });
      if (found < 0) { leave(); return; }
      var p = panels[found];
      place = {panel: found, u: (x - p.box[0]) / p.box[2], v: (y - p.box[1]) / p.box[3]};
      at(p, place.u, place.v);
    });
    canvas.addEventListener("pointerleave", leave);
    canvas.addEventListener("blur", leave);
    canvas.addEventListener("keydown", function (event) {
      var p = panels[place.panel], moves = {ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1]};
      if (event.key === "Escape") { leave(); return; }
      if (event.key === "PageDown" || event.key === "PageUp") {
        place = {panel: (place.panel + (event.key === "PageDown" ? 1 : panels.length - 1)) % panels.length, u: 0.02, v: 0.02};
      } else if (moves[event.key]) {
        var across = p.kind === "map" ? p.columns.length - 1 : p.kind === "lines" ? p.series[0].x.length - 1 : p.rows.length;
        var down = p.kind === "map" ? p.rows.length - 1 : p.rows.length || 1;
        place.u = Math.max(0.5 / (across + 1), Math.min(1 - 0.5 / (across + 1), place.u + moves[event.key][0] / across));
        place.v = Math.max(0.5 / (down + 1), Math.min(1 - 0.5 / (down + 1), place.v + moves[event.key][1] / down));
      } else { return; }
      event.preventDefault();
      at(panels[place.panel], place.u, place.v);
    });
    var bar = make("div", {"class": "tools"}), picture = make("button", {type: "button"}, "SVG");
    var data = make("button", {type: "button"}, "CSV");
    picture.setAttribute("aria-label", "SVG of figure " + name);
    data.setAttribute("aria-label", "CSV of figure " + name);
    picture.addEventListener("click", function () {
      var copy = svg.cloneNode(true), style = make("style", {}, document.getElementById("theme").textContent);
      copy.insertBefore(style, copy.firstChild);
      save(name + ".svg", "image/svg+xml", new XMLSerializer().serializeToString(copy));
    });
    data.addEventListener("click", function () {
      var rows = [["panel", "series", "x", "value"]];
      panels.forEach(function (p) {
        p.series.forEach(function (s) { s.x.forEach(function (x, i) { rows.push([p.name, s.name, x, s.y[i]]); }); });
      });
      save(name + ".csv", "text/csv", csv(rows));
    });
    bar.append(picture, data);
    figure.appendChild(bar);
  });
  window.addEventListener("scroll", hide, {passive: true});

  // -- scrolling parts are reached by keyboard; the printed page shows what is folded -------------
  function reach() {
    document.querySelectorAll(".scroll").forEach(function (part, place) {
      if (part.scrollWidth > part.clientWidth + 1) {
        part.tabIndex = 0;
        part.setAttribute("role", "region");
        part.setAttribute("aria-label", (part.querySelector("table") ? "Table " : "Figure ") + (place + 1) + ", scrolls sideways");
      } else { part.removeAttribute("tabindex"); part.removeAttribute("role"); part.removeAttribute("aria-label"); }
    });
  }
  window.addEventListener("beforeprint", function () {
    document.querySelectorAll("details:not([open]):not(.tokens):not(#all-tokens)").forEach(function (part) {
      part.open = true;
      part.dataset.printed = "";
    });
  });
  window.addEventListener("afterprint", function () {
    document.querySelectorAll("details[data-printed]").forEach(function (part) {
      part.open = false;
      delete part.dataset.printed;
    });
  });
  reach();
  window.addEventListener("resize", reach);
  document.addEventListener("toggle", reach, true);
})();
