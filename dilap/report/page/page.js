// Draws every figure in the colours of the page, again when they change, and reads them out by arrow keys.
const figures = JSON.parse(document.getElementById("figures").textContent);
const dark = window.matchMedia("(prefers-color-scheme: dark)");
const PALETTE = {
  light: ["#0b5cad", "#c2410c", "#15803d", "#9333ea", "#b91c5c", "#0f766e", "#854d0e", "#475569"],
  dark: ["#7ab8ff", "#ffa657", "#6fd08c", "#d2a8ff", "#ff9bce", "#5eead4", "#e3b341", "#b6c2cf"],
};

function config(isDark) {
  const ink = isDark ? "#e8eaed" : "#1a1d21", soft = isDark ? "#a2abb6" : "#5b636e", line = isDark ? "#2b313a" : "#e5e8ec";
  const font = "system-ui, -apple-system, 'Segoe UI', Roboto, 'DejaVu Sans', sans-serif";
  const text = { labelColor: ink, titleColor: soft, labelFont: font, titleFont: font, labelFontSize: 12, titleFontSize: 12, titleFontWeight: "normal" };
  return {
    background: "transparent", view: { stroke: null },
    axis: { ...text, gridColor: line, domainColor: soft, tickColor: soft, titlePadding: 8 },
    axisQuantitative: { tickCount: window.innerWidth < 600 ? 5 : 9 },
    legend: { ...text, orient: "top", symbolSize: 90, columns: window.innerWidth < 600 ? 2 : 6, labelLimit: 220 },
    range: { category: PALETTE[isDark ? "dark" : "light"] }, font,
  };
}

async function draw(isDark) {
  for (const figure of figures) {
    const own = figure.spec.config || {};
    const spec = {
      ...figure.spec, width: "container",
      description: figure.description, data: { name: "rows", values: figure.rows }, config: own,
    };
    const element = document.getElementById("plot-" + figure.name);
    await vegaEmbed(element, spec, {
      ast: true, renderer: "svg", config: config(isDark), tooltip: { theme: isDark ? "dark" : "light" },
      actions: { export: true, source: false, compiled: false, editor: false }, downloadFileName: figure.name,
    });
    element.dataset.drawn = isDark ? "dark" : "light";
  }
}

function readable(figure) {
  const element = document.getElementById("plot-" + figure.name), status = element.nextElementSibling;
  let at = -1;
  element.addEventListener("keydown", (event) => {
    const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
    if (!step) return;
    event.preventDefault();
    at = (at + step + figure.rows.length) % figure.rows.length;
    status.textContent = figure.columns.map(([key, title]) => [title, figure.rows[at][key]])
      .filter(([, value]) => value !== null && value !== "")
      .map(([title, value]) => title + ": " + (typeof value === "number" ? Number(value.toPrecision(4)) : value)).join(", ");
  });
}

let drawing = draw(dark.matches);
const redraw = (isDark) => { drawing = drawing.then(() => draw(isDark)); };
figures.forEach(readable);
dark.addEventListener("change", (event) => redraw(event.matches));
window.addEventListener("beforeprint", () => {
  document.querySelectorAll("details").forEach((one) => { if (!one.closest(".plot")) one.open = true; });
  if (dark.matches) redraw(false);
});
window.addEventListener("afterprint", () => { if (dark.matches) redraw(true); });
