// Draws every figure of the page from the JSON that stands in it.
for (const holder of document.querySelectorAll(".figure")) {
  const { data, layout } = JSON.parse(holder.querySelector("script").textContent);
  const chart = document.createElement("div");
  if (layout.height) chart.style.height = `${layout.height}px`;
  holder.append(chart);
  Plotly.newPlot(chart, data, layout, { responsive: true });
}
