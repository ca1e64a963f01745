"use strict";
// Shows and hides runs, and the single seeds of a mean. Without it the page shows all but the single seeds.
(() => {
  const { filters } = JSON.parse(document.getElementById("data").textContent);
  const hiddenOptions = new Set(); // "filter/option"
  document.documentElement.classList.add("interactive");

  const isShown = (run) =>
    filters.every((filter, outer) =>
      filter.options.every((option, inner) => !hiddenOptions.has(`${outer}/${inner}`) || !option.runs.includes(run)));

  function showRuns() {
    for (const part of document.querySelectorAll("[data-runs]")) {
      const runs = part.dataset.runs.split(" ").filter(Boolean).map(Number);
      part.classList.toggle("off", runs.length > 0 && !runs.some(isShown));
    }
    const all = new Set(filters.flatMap((filter) => filter.options.flatMap((option) => option.runs)));
    const shown = [...all].filter(isShown);
    const status = document.getElementById("shown");
    if (status) status.textContent = `${shown.length} of ${all.size} runs shown`;
  }

  document.addEventListener("click", (event) => {
    const button = event.target.closest("button");
    if (!button) return;
    const { filter, option, seeds } = button.dataset;
    const pressed = button.getAttribute("aria-pressed") === "true";
    button.setAttribute("aria-pressed", String(!pressed));
    if (filter !== undefined) {
      hiddenOptions[pressed ? "add" : "delete"](`${filter}/${option}`);
      showRuns();
    } else if (seeds !== undefined) {
      document.getElementById(seeds).classList.toggle("with-seeds", !pressed);
    }
  });

  function markCut() { // a table that is cut at the right says so, until it is scrolled to its end
    for (const box of document.querySelectorAll(".scroll")) {
      box.classList.toggle("cut", box.scrollLeft + box.clientWidth < box.scrollWidth - 1);
    }
  }
  addEventListener("resize", markCut);
  document.addEventListener("scroll", markCut, true);
  document.addEventListener("toggle", markCut, true);
  markCut();
  showRuns();
})();
