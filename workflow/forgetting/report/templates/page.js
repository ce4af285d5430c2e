"use strict";
(() => {
  const settings = JSON.parse(document.getElementById("settings").textContent);
  const root = document.documentElement;
  const charts = [...document.querySelectorAll(".chart")];
  const views = new Map();
  const kept = new Map(); // menu and checkbox settings of each chart, kept when it is redrawn
  const focused = new Set();
  const GAP = 28;
  const AXIS = 60;
  const WIDEST = 640;

  // The system's theme until the reader chooses one. A browser may forbid storage for local files.
  const stored = (() => { try { return localStorage.getItem("theme"); } catch { return null; } })();
  const system = matchMedia("(prefers-color-scheme: dark)");
  let mode = stored || (system.matches ? "dark" : "light");

  function applyTheme() {
    const button = document.getElementById("theme");
    root.dataset.theme = mode;
    button.textContent = mode === "dark" ? "Light" : "Dark";
    button.setAttribute("aria-label", `Switch to ${mode === "dark" ? "light" : "dark"} colours`);
  }

  document.getElementById("theme").addEventListener("click", () => {
    mode = mode === "dark" ? "light" : "dark";
    try { localStorage.setItem("theme", mode); } catch { /* not remembered, but switched */ }
    applyTheme();
    drawAll();
  });
  system.addEventListener("change", (event) => {
    if (stored) return;
    mode = event.matches ? "dark" : "light";
    applyTheme();
    drawAll();
  });

  // As many columns as fit. The width of axes is known only after drawing: a second pass corrects it.
  function laidOut(spec, room, excess) {
    const { narrowest, columns } = spec.usermeta.layout;
    const fit = Math.floor((room + GAP) / (narrowest + AXIS + GAP));
    let count = Math.max(1, Math.min(columns, fit));
    if (count < columns) count = Math.ceil(columns / Math.ceil(columns / count));
    const width = (room - 8 - (count - 1) * GAP) / count - AXIS - excess / count;
    const panel = Math.floor(Math.min(Math.max(width, 80), WIDEST));
    const panels = spec.concat.map((part) => ({ ...part, width: panel }));
    return { ...spec, columns: count, concat: panels };
  }

  // On the page the chips are the legend; a saved figure has a legend. `ast` avoids eval.
  async function embed(element, spec, forFile = false) {
    const paper = getComputedStyle(document.querySelector(".figure")).backgroundColor;
    const config = { ...settings.themes[mode], background: forFile ? paper : "transparent" };
    config.legend = { ...config.legend, disable: !forFile };
    const result = await vegaEmbed(element, spec, {
      config, mode: "vega-lite", renderer: forFile ? "none" : "svg", actions: false, ast: true,
      tooltip: { theme: mode },
    });
    return result.view;
  }

  function restore(view, name) {
    for (const [signal, value] of Object.entries(kept.get(name) || {})) view.signal(signal, value);
    return view.signal("focus", [...focused]).runAsync();
  }

  async function draw(chart) {
    const name = chart.dataset.figure;
    const spec = settings.figures[name];
    const room = chart.clientWidth;
    remember(name);
    views.get(name)?.finalize();
    try {
      let view = await embed(chart, laidOut(spec, room, 0));
      const excess = chart.querySelector("svg").getBoundingClientRect().width - room;
      if (excess > 0 || excess < -4) {
        view.finalize();
        view = await embed(chart, laidOut(spec, room, excess + 4));
      }
      views.set(name, view);
      view.addEventListener("click", (event, item) => {
        const label = item && item.datum && item.datum.label;
        if (label && label !== "base") toggle(label);
      });
      await restore(view, name);
      chart.dataset.drawn = String(room);
    } catch (error) {
      chart.textContent = `This figure could not be drawn: ${error.message}`;
      chart.classList.add("failure");
      throw error;
    }
  }

  function remember(name) {
    const view = views.get(name);
    const params = settings.figures[name].params || [];
    if (!view) return;
    kept.set(name, Object.fromEntries(
      params.filter((param) => param.bind).map((param) => [param.name, view.signal(param.name)])
    ));
  }

  // Charts are drawn one after the other, so that no chart is drawn twice at the same time.
  let queue = Promise.resolve();
  function drawAll(only = charts) {
    queue = queue.then(async () => {
      for (const chart of only) {
        await draw(chart);
        // The window may have been resized meanwhile.
        if (chart.clientWidth !== Number(chart.dataset.drawn)) await draw(chart);
      }
    });
    return queue;
  }

  let waiting = 0;
  new ResizeObserver(() => {
    clearTimeout(waiting);
    waiting = setTimeout(() => {
      const stale = charts.filter((c) => c.dataset.drawn && Number(c.dataset.drawn) !== c.clientWidth);
      if (stale.length) drawAll(stale);
    }, 150);
  }).observe(document.getElementById("figures"));

  // Highlighting methods in all figures.
  const chips = [...document.querySelectorAll(".chip[data-label]")];
  const all = document.querySelector(".chip.all");

  function toggle(label) {
    if (!focused.delete(label)) focused.add(label);
    showFocus();
  }

  function showFocus() {
    for (const chip of chips) chip.setAttribute("aria-pressed", String(focused.has(chip.dataset.label)));
    all.hidden = focused.size === 0;
    for (const view of views.values()) view.signal("focus", [...focused]).runAsync();
  }

  for (const chip of chips) chip.addEventListener("click", () => toggle(chip.dataset.label));
  all.addEventListener("click", () => { focused.clear(); showFocus(); chips[0]?.focus(); });

  // Saving a figure as shown.
  for (const button of document.querySelectorAll("[data-save]")) {
    button.addEventListener("click", async () => {
      const { save, of } = button.dataset;
      if (!views.has(of)) return;
      remember(of);
      const view = await embed(document.createElement("div"), settings.figures[of], true);
      await restore(view, of);
      const link = document.createElement("a");
      link.href = await view.toImageURL(save, 2);
      link.download = `${of}.${save}`;
      link.click();
      view.finalize();
    });
  }

  // The table of runs: filter and sort.
  const table = document.getElementById("run-table");
  const body = table.tBodies[0];
  const filter = document.getElementById("filter");
  const only = document.getElementById("only-chosen");

  function showRows() {
    const words = filter.value.toLowerCase().split(/[\s,]+/).filter(Boolean);
    let shown = 0;
    for (const row of body.rows) {
      const text = row.textContent.toLowerCase();
      const keep = words.every((word) => text.includes(word))
        && (!only.checked || row.classList.contains("chosen"));
      row.hidden = !keep;
      shown += keep;
    }
    document.getElementById("count").textContent = `${shown} of ${body.rows.length} runs`;
  }

  function sortBy(column, header) {
    const down = header.getAttribute("aria-sort") === "ascending";
    for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
    header.setAttribute("aria-sort", down ? "descending" : "ascending");
    const key = (row) => row.cells[column].dataset.value ?? row.cells[column].textContent.trim();
    const compare = (one, other) => {
      const [a, b] = [key(one), key(other)];
      if (a === "" || b === "") return (a === "") - (b === ""); // absent values always last
      const order = isNaN(a) || isNaN(b) ? a.localeCompare(b) : a - b;
      return down ? -order : order;
    };
    body.append(...[...body.rows].sort(compare));
  }

  [...table.tHead.rows[0].cells].forEach((header, column) => {
    header.querySelector("button").addEventListener("click", () => sortBy(column, header));
  });
  filter.addEventListener("input", showRows);
  only.addEventListener("change", showRows);

  applyTheme();
  showRows();
  drawAll();
})();
