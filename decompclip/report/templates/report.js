// Draws every figure of the page in the colours of the reader's scheme; on paper always in the light ones.
(() => {
  "use strict";
  const dark = window.matchMedia("(prefers-color-scheme: dark)");
  const root = document.documentElement;
  const charts = [];

  // A page from a file may have no storage: the choice then lasts as long as the page.
  const remember = (value) => {
    try {
      if (value === undefined) return localStorage.getItem("decompclip-scheme");
      localStorage.setItem("decompclip-scheme", value);
    } catch {
      return null;
    }
    return value;
  };
  const isDark = () => (root.dataset.scheme ? root.dataset.scheme === "dark" : dark.matches);

  const look = (inDark) => {
    const ink = inDark ? "#d6dce2" : "#333d47";
    const grid = inDark ? "rgba(170, 180, 190, 0.22)" : "rgba(128, 138, 148, 0.25)";
    return { ink, grid };
  };

  const themed = (layout, inDark) => {
    const { ink, grid } = look(inDark);
    const changes = { "font.color": ink };
    for (const key of Object.keys(layout)) {
      if (/^[xy]axis\d*$/.test(key)) {
        changes[`${key}.gridcolor`] = grid;
        changes[`${key}.zerolinecolor`] = grid;
      }
    }
    return changes;
  };

  const recolour = (inDark) => {
    for (const chart of charts) Plotly.relayout(chart, themed(chart.layout, inDark));
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
      if (isDark()) Plotly.relayout(chart, themed(chart.layout, true));
    });
  };

  const button = document.getElementById("scheme");
  const label = () => {
    button.textContent = isDark() ? "Light" : "Dark";
    button.setAttribute("aria-label", `Show the page in ${isDark() ? "light" : "dark"} colours`);
  };
  const chosen = remember();
  if (chosen === "light" || chosen === "dark") root.dataset.scheme = chosen;
  button.hidden = false;
  label();
  button.addEventListener("click", () => {
    root.dataset.scheme = isDark() ? "light" : "dark";
    remember(root.dataset.scheme);
    label();
    recolour(isDark());
  });

  const links = new Map([...document.querySelectorAll("nav a")].map((a) => [a.hash.slice(1), a]));
  const seen = new Set();
  const watcher = new IntersectionObserver(
    (entries) => {
      for (const entry of entries) seen[entry.isIntersecting ? "add" : "delete"](entry.target.id);
      const current = [...links.keys()].find((id) => seen.has(id));
      for (const [id, link] of links) {
        if (id === current) link.setAttribute("aria-current", "true");
        else link.removeAttribute("aria-current");
      }
    },
    { rootMargin: "-15% 0px -70% 0px" },
  );
  for (const id of links.keys()) watcher.observe(document.getElementById(id));

  document.querySelectorAll(".figure").forEach(draw);
  dark.addEventListener("change", () => {
    label();
    recolour(isDark());
  });

  // On paper: light colours, everything unfolded, figures as wide as the page.
  const folded = [];
  let before = root.dataset.scheme;
  window.addEventListener("beforeprint", () => {
    before = root.dataset.scheme;
    root.dataset.scheme = "light";
    for (const details of document.querySelectorAll("details:not([open])")) {
      details.open = true;
      folded.push(details);
    }
    recolour(false);
    for (const chart of charts) Plotly.Plots.resize(chart);
  });
  window.addEventListener("afterprint", () => {
    if (before === undefined) delete root.dataset.scheme;
    else root.dataset.scheme = before;
    while (folded.length) folded.pop().open = false;
    recolour(isDark());
    for (const chart of charts) Plotly.Plots.resize(chart);
  });
})();
