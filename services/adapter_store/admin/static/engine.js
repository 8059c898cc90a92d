// What one worker's iterations are made of: the last minute, in slots of half a second.
"use strict";

const REFRESH_MS = 1000;
const BRIDGED = 6; // slots without an iteration that a line goes on over
const NOW = 4; // slots that a value under the charts may be old

const opaque = (name, percent) => `color-mix(in srgb, ${color(name)} ${percent}%, ${color("panel")})`;
const COLORS = {
  decode: () => color("inference"),
  prefill: () => opaque("inference", 45),
  forward: () => opaque("training", 50),
  backward: () => color("training"),
  ms: () => color("text"),
  predicted_ms: () => soft("text", 45),
  limit_ms: () => color("bad"),
  tokens_share: () => soft("training", 55),
  time_share: () => color("training"),
  running: () => color("inference"),
  waiting: () => color("bad"),
  kv: () => color("inference"),
};
const asPercent = (value) => (value == null ? "–" : `${Math.round(value * 100)} %`);
const asCount = (value) => (value == null ? "–" : value < 9.95 ? String(Number(value.toFixed(1))) : value.toFixed(0));

// uPlot breaks a line at null and goes on over undefined.
function bridge(values) {
  const bridged = [...values];
  let last = -Infinity;
  values.forEach((value, i) => {
    if (value == null) return;
    if (i - last <= BRIDGED) bridged.fill(undefined, last + 1, i);
    last = i;
  });
  return bridged;
}

function engineCharts(root) {
  const plain = (name, more) => line(name, { stroke: COLORS[name], width: 1.5, spanGaps: false, ...more });
  const area = (name) => plain(name, { fill: () => soft("inference", 9) });
  const bars = (name) => line(name, { stroke: COLORS[name], fill: COLORS[name], width: 0, paths: uPlot.paths.bars({ size: [0.84, 100] }) });
  const make = (chart, names, series, words, more) => {
    const outputs = names.map((name, i) => [i + 1, root.querySelector(`[data-value="${chart} ${name}"]`), words]);
    const made = new Chart(root.querySelector(`[data-chart="${chart}"]`), series, {
      sync: "engine", time: true, bottom: 0, reach: NOW, outputs, empty: "No iteration in the last minute", ...more,
    });
    return [made, names];
  };
  const lines = (chart, styles, words, more) => make(chart, Object.keys(styles), Object.entries(styles).map(([name, style]) => plain(name, style)), words, more);
  const shares = { top: 1, words: (_, values) => values.map(asPercent) };
  const kinds = ["backward", "forward", "prefill", "decode"]; // from above
  const stacked = [make("tokens", kinds, kinds.map(bars), asCount, { stacked: true })];
  const others = [
    lines("time", { limit_ms: { dash: [5, 4], width: 1.2 }, predicted_ms: { dash: [2, 3] }, ms: {} }, asCount),
    lines("share", { tokens_share: {}, time_share: {} }, asPercent, shares),
    lines("queue", { running: {}, waiting: {} }, asCount),
    make("kv", ["kv"], [area("kv")], asPercent, shares),
  ];

  every(async () => {
    const response = await fetch(root.dataset.iterations, { headers: { "hx-request": "true" } });
    if (!response.ok) throw new Error(`status ${response.status}`);
    const { figures, slots } = await response.json();
    for (const output of root.querySelectorAll("[data-figure]")) output.textContent = figures[output.dataset.figure] ?? "–";
    root.querySelector("[data-dropped]").hidden = !figures.dropped;
    if (!slots.at) return false;
    for (const [chart, names] of stacked) chart.show([slots.at, ...names.map((name) => slots[name])]);
    for (const [chart, names] of others) chart.show([slots.at, ...names.map((name) => bridge(slots[name]))]);
    return false;
  }, REFRESH_MS);
}

document.addEventListener("DOMContentLoaded", () => {
  const root = document.querySelector("[data-iterations]");
  if (root) engineCharts(root);
});
