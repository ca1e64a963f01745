"use strict";
// Draws the charts in place of their still pictures, in light or dark colours; shows and hides runs.
(async () => {
  const read = (id) => document.getElementById(id).textContent;
  const root = document.documentElement;
  const { charts, filters, palettes } = JSON.parse(read("data"));
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const touch = matchMedia("(pointer: coarse)").matches;
  const hiddenOptions = new Set(); // "filter/option"
  const logs = {}; // figure -> { xaxis: true, … } where it was switched by hand

  try {
    const bytes = Uint8Array.from(atob(read("library")), (character) => character.charCodeAt(0));
    const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
    const script = document.createElement("script");
    script.textContent = await new Response(stream).text();
    document.head.append(script);
    if (!window.Plotly) throw new Error("plotly.js did not start");
  } catch (error) {
    console.warn(`the pictures stay still: ${error}`); // an old browser: pictures and tables show the same
    root.dataset.drawn = "still";
    return;
  }
  root.classList.add("interactive");

  const figureOf = (id) => id.slice(0, id.lastIndexOf("-"));
  const variable = (name) => getComputedStyle(root).getPropertyValue(name).trim();
  const isShown = (run) =>
    filters.every((filter, outer) =>
      filter.options.every((option, inner) => !hiddenOptions.has(`${outer}/${inner}`) || !option.runs.includes(run)));

  function painted(trace) {
    const { colour: index, runs } = trace.meta;
    const copy = structuredClone(trace);
    copy.visible = runs.length === 0 || runs.some(isShown);
    const text = variable("--quiet");
    if (index === null) {
      copy.colorbar = { ...copy.colorbar, tickfont: { color: text } };
      return copy;
    }
    const colour = palettes[dark.matches ? "dark" : "light"][index];
    if (copy.type === "scatter") copy.line = { ...copy.line, color: colour };
    copy.marker = { ...copy.marker, color: colour };
    if (copy.type === "scatter") copy.marker.line = { ...copy.marker.line, color: colour };
    if (copy.error_y) copy.error_y = { ...copy.error_y, color: colour };
    return copy;
  }

  function laidOut(id) {
    const layout = structuredClone(charts[id].layout);
    const [text, rule, page, raised] = ["--text", "--rule", "--page", "--raised"].map(variable);
    for (const axis of ["xaxis", "yaxis"]) {
      const chosen = logs[figureOf(id)]?.[axis];
      if (chosen !== undefined) layout[axis].type = chosen ? "log" : "linear";
      Object.assign(layout[axis], { gridcolor: rule, linecolor: rule, zerolinecolor: rule, tickfont: { color: text } });
      if (layout[axis].type === "log" && !layout[axis].tickvals) {
        Object.assign(layout[axis], { tickformat: ".4~g", nticks: 4 }); // 2000, not a small 2; and few of them
      }
      layout[axis].title.font = { color: text, size: 13 };
    }
    return {
      ...layout,
      ...(touch ? { dragmode: false } : {}), // a finger on a chart scrolls the page
      autosize: true, uirevision: JSON.stringify(logs[figureOf(id)] ?? {}),
      paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", font: { color: text, family: "inherit", size: 12 },
      hoverlabel: { bgcolor: raised, bordercolor: text, font: { color: text } },
      modebar: { bgcolor: page, color: variable("--quiet"), activecolor: text },
    };
  }

  const options = {
    responsive: true, displaylogo: false, doubleClick: "reset",
    displayModeBar: touch ? false : "hover", // it would cover the data
    modeBarButtons: [["toImage"], ["zoom2d", "pan2d"], ["zoomIn2d", "zoomOut2d", "resetScale2d"]], // none that sends data away
  };
  const render = (id) => Plotly.react(id, charts[id].data.map(painted), laidOut(id), options);

  let latest = 0;
  async function renderAll(ids) {
    const mine = ++latest;
    const top = (id) => Math.abs(document.getElementById(id).getBoundingClientRect().top);
    for (const id of ids.sort((a, b) => top(a) - top(b))) { // first what is on screen
      await render(id);
      await new Promise((resolve) => setTimeout(resolve)); // keeps the page responsive
      if (mine !== latest) return;
    }
    root.dataset.drawn = "charts";
  }

  function showRuns() {
    const rows = document.querySelectorAll("[data-run]");
    let count = 0;
    for (const row of rows) {
      row.hidden = !isShown(Number(row.dataset.run));
      count += row.hidden ? 0 : 1;
    }
    const status = document.getElementById("shown");
    if (status) status.textContent = `(${count} of ${rows.length} shown)`;
  }

  document.addEventListener("click", (event) => {
    const button = event.target.closest("button");
    if (!button) return;
    const { filter, option, log, figure, reset } = button.dataset;
    const pressed = button.getAttribute("aria-pressed") === "true";
    if (filter !== undefined) {
      button.setAttribute("aria-pressed", String(!pressed));
      hiddenOptions[pressed ? "add" : "delete"](`${filter}/${option}`);
      showRuns();
      renderAll(Object.keys(charts));
    } else if (log !== undefined) {
      button.setAttribute("aria-pressed", String(!pressed));
      logs[figure] = { ...logs[figure], [log]: !pressed };
      renderAll(Object.keys(charts).filter((id) => figureOf(id) === figure));
    } else if (reset !== undefined) {
      for (const id of Object.keys(charts).filter((one) => figureOf(one) === reset)) {
        Plotly.relayout(id, { "xaxis.autorange": true, "yaxis.autorange": true });
      }
    }
  });
  for (const button of document.querySelectorAll("button[data-log]")) { // as the charts start
    const first = charts[`${button.dataset.figure}-0`];
    button.setAttribute("aria-pressed", String(first.layout[button.dataset.log].type === "log"));
  }
  dark.addEventListener("change", () => renderAll(Object.keys(charts)));
  showRuns();
  await renderAll(Object.keys(charts));
})();
