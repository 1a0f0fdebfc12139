// Draws every figure of the page in the colours of the reader's scheme; on paper always in the light ones.
(() => {
  "use strict";
  const dark = window.matchMedia("(prefers-color-scheme: dark)");
  const charts = [];

  const look = (isDark) => {
    const ink = isDark ? "#d6dce2" : "#333d47";
    const grid = isDark ? "rgba(170, 180, 190, 0.22)" : "rgba(128, 138, 148, 0.25)";
    return { ink, grid };
  };

  const themed = (layout, isDark) => {
    const { ink, grid } = look(isDark);
    const changes = { "font.color": ink };
    for (const key of Object.keys(layout)) {
      if (/^[xy]axis\d*$/.test(key)) {
        changes[`${key}.gridcolor`] = grid;
        changes[`${key}.zerolinecolor`] = grid;
      }
    }
    return changes;
  };

  const recolour = (isDark) => {
    for (const chart of charts) Plotly.relayout(chart, themed(chart.layout, isDark));
  };

  const draw = (holder) => {
    const figure = JSON.parse(holder.querySelector("script").textContent);
    const chart = document.createElement("div");
    chart.className = "chart";
    chart.style.height = `${figure.layout.height}px`;
    holder.append(chart);
    const options = { responsive: true, displayModeBar: false };
    Plotly.newPlot(chart, figure.data, figure.layout, options).then(() => {
      charts.push(chart);
      if (dark.matches) Plotly.relayout(chart, themed(chart.layout, true));
    });
  };

  document.querySelectorAll(".figure").forEach(draw);
  dark.addEventListener("change", (event) => recolour(event.matches));
  window.addEventListener("beforeprint", () => recolour(false));
  window.addEventListener("afterprint", () => recolour(dark.matches));
})();
