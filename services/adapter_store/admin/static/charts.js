// The curves: of one job, of two versions side by side, and of what the workers do now. What a chart is also
// serves the engine's page.
"use strict";

const POLL_MS = 2000;
const KEPT_S = 600; // of throughput
const SHOWN_S = 60; // at least
const style = getComputedStyle(document.documentElement);
const color = (name) => style.getPropertyValue(`--${name}`).trim();
const soft = (name, percent) => `color-mix(in srgb, ${color(name)} ${percent}%, transparent)`;

function compact(value) {
  if (value == null) return "–";
  const size = Math.abs(value);
  if (size >= 1e6) return `${(value / 1e6).toPrecision(3)}M`;
  if (size >= 1e4) return `${(value / 1e3).toPrecision(3)}k`;
  if (size >= 100) return value.toFixed(0);
  if (size === 0 || size >= 0.01) return String(Number(value.toPrecision(4)));
  return value.toExponential(2).replace("e-", "e−");
}

const clock = (_, values) => values.map((at) => new Date(at * 1000).toLocaleTimeString([], { hour12: false }));
const ticks = (_, values) => values.map((value) => {
  const text = compact(value);
  return text.includes("e") ? value.toExponential(1).replace(".0", "").replace("e-", "e−") : text;
});

function axis(more) {
  return {
    stroke: () => color("muted"),
    font: `11px ${style.getPropertyValue("--sans")}`,
    grid: { stroke: () => color("line-soft"), width: 1 },
    ticks: { show: false },
    ...more,
  };
}

function line(name, more) {
  return { stroke: () => color(name), width: 1.8, points: { show: false }, spanGaps: true, ...more };
}

const dots = (name) => ({ points: { show: true, size: 6, width: 1.6, stroke: () => color(name), fill: () => color("panel") } });

// A chart that fills its element, follows its width and the colour scheme, and says when it has no data.
class Chart {
  constructor(element, series, {
    sync, time = false, stacked = false, outputs = [], step = null, reach = Infinity,
    bottom = null, top = null, words = ticks, empty = "No step yet",
  } = {}) {
    this.element = element;
    this.stacked = stacked; // the last series lies at the bottom
    this.reach = reach; // how many points may be passed over for a value
    this.outputs = outputs; // [column, where to write its value, how]
    this.step = step; // where to write the step under the cursor
    this.note = Object.assign(document.createElement("div"), { className: "chart-empty", textContent: empty });
    element.append(this.note);
    element.classList.add("chart-is-empty");
    this.data = [[], ...series.map(() => [])];
    this.plot = new uPlot({
      ...this.size(),
      scales: { x: { time, ...(time ? { range: Chart.window } : {}) }, y: { range: (_, low, high) => Chart.range(low, high, bottom, top) } },
      axes: [
        axis({ size: 24, gap: 4, space: time ? 90 : 70, values: time ? clock : ticks }),
        axis({ size: 46, gap: 6, space: element.clientHeight > 180 ? 34 : 22, values: words }),
      ],
      padding: [8, time ? 26 : 10, 0, 0], // half of the last time is written beyond its tick
      series: [{}, ...series],
      legend: { show: false },
      cursor: { y: false, points: { size: 6 }, ...(sync ? { sync: { key: sync } } : {}) },
      hooks: { setCursor: [() => this.report()] },
    }, this.data, element);
    new ResizeObserver(() => this.plot.setSize(this.size())).observe(element);
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => this.plot.redraw());
  }

  static range(low, high, bottom, top) {
    if (low == null) return [0, 1];
    const pad = (high - low || Math.abs(high) || 1) * 0.08;
    return [bottom ?? low - pad, top ?? high + pad];
  }

  // Each column with all that lie below it.
  static stack([at, ...columns]) {
    const sums = at.map(() => null);
    return [at, ...columns.reverse().map((column) => column.map((value, i) => {
      if (value != null) sums[i] += value;
      return sums[i];
    })).reverse()];
  }

  // Not narrower than a minute, so that two points do not look like a history.
  static window(_, first, last) {
    return last == null ? [0, SHOWN_S] : [Math.min(first, last - SHOWN_S), last];
  }

  size() {
    const box = getComputedStyle(this.element);
    const inner = (total, ...sides) => total - sides.reduce((sum, side) => sum + parseFloat(box[side]), 0);
    return {
      width: Math.max(120, inner(this.element.clientWidth, "paddingLeft", "paddingRight")),
      height: inner(this.element.clientHeight, "paddingTop", "paddingBottom"),
    };
  }

  show(data) {
    this.data = data;
    const isEmpty = !data.slice(1).some((values) => values.some((value) => value != null));
    this.element.classList.toggle("chart-is-empty", isEmpty);
    this.plot.setData(this.stacked ? Chart.stack(data) : data);
    this.report();
  }

  // The newest, or the newest at the cursor.
  report() {
    if (!this.plot) return;
    const under = this.plot.cursor.idx;
    for (const [column, output, words] of this.outputs) {
      const end = under == null ? this.data[column].length : under + 1;
      const values = this.data[column].slice(Math.max(0, end - this.reach), end);
      output.textContent = words(values.findLast((value) => value != null));
    }
    if (this.step) this.step.textContent = under == null ? "" : `step ${this.data[0][under]}`;
  }
}

// Exponential moving average over the known values.
function smooth(values, weight) {
  let mean = null;
  return values.map((value) => {
    if (value == null) return null;
    mean = mean == null ? value : mean + (value - mean) * weight;
    return mean;
  });
}

// The steps of a job by their number: what comes again replaces.
class Curves {
  constructor(url) {
    this.url = url;
    this.rows = new Map();
    this.from = 0;
  }

  async fetch() {
    const response = await fetch(`${this.url}?from_step=${this.from}`, { headers: { "hx-request": "true" } });
    if (!response.ok) throw new Error(`status ${response.status}`);
    const { curves, ...state } = await response.json();
    this.names = Object.keys(curves).filter((name) => name !== "step");
    curves.step.forEach((step, i) => this.rows.set(step, this.names.map((name) => curves[name][i])));
    this.from = state.step;
    return state;
  }

  columns() {
    const steps = [...this.rows.keys()].sort((a, b) => a - b);
    const columns = { step: steps };
    this.names.forEach((name, i) => { columns[name] = steps.map((step) => this.rows.get(step)[i]); });
    return columns;
  }
}

const every = (work, wait = POLL_MS) => {
  const turn = async () => {
    let isOver = false;
    if (!document.hidden) {
      try { isOver = await work(); } catch { /* the banner says it; try again */ }
    }
    if (!isOver) setTimeout(turn, wait);
  };
  turn();
};

function jobCharts(root) {
  const curves = new Curves(root.dataset.curves);
  const at = (attribute, name) => root.querySelector(`[data-${attribute}="${name}"]`);
  const make = (name, series, outputs) => new Chart(at("chart", name), series, { sync: "job", outputs, step: at("step", name) });
  const fixed = (value) => (value == null ? "–" : value.toFixed(3));
  const paired = (name) => make(
    name,
    [line("training", { stroke: () => soft("training", 30), width: 1 }), line("training"), line("inference", dots("inference"))],
    [[1, at("value", `${name} training`), fixed], [3, at("value", `${name} validation`), fixed]],
  );
  const single = (name) => make(
    name,
    [line("text", { width: 1.3, stroke: () => soft("text", 60) })],
    [[1, at("value", name), compact]],
  );
  const loss = paired("loss");
  const accuracy = paired("accuracy");
  const singles = ["learning_rate", "grad_norm", "tokens_per_s"].map((name) => [name, single(name)]);

  every(async () => {
    const state = await curves.fetch();
    const data = curves.columns();
    const weight = Math.max(0.06, Math.min(1, 12 / data.step.length));
    loss.show([data.step, data.train_loss, smooth(data.train_loss, weight), data.valid_loss]);
    const train = data.train_mean_token_accuracy;
    accuracy.show([data.step, train, smooth(train, weight), data.valid_mean_token_accuracy]);
    for (const [name, chart] of singles) chart.show([data.step, data[name]]);
    return state.is_over;
  });
}

function versusCharts(root) {
  const both = [new Curves(root.dataset.left), new Curves(root.dataset.right)];
  const make = (name, more, empty) => new Chart(
    root.querySelector(`[data-chart="${name}"]`),
    ["inference", "training"].map((each) => line(each, more(each))),
    { sync: "versus", empty },
  );
  const valid = make("valid_loss", dots, "Trained without a validation file");
  const train = make("train_loss", () => ({ width: 1.4 }), "No step was reported");
  Promise.all(both.map((curves) => curves.fetch())).then(() => {
    const columns = both.map((curves) => curves.columns());
    valid.show(uPlot.join(columns.map((column) => [column.step, column.valid_loss])));
    train.show(uPlot.join(columns.map((column) => [column.step, smooth(column.train_loss, 0.1)])));
  }).catch(() => { valid.note.textContent = "The curves cannot be read now"; });
}

// Kept over page loads, so that a look at a job does not empty the chart.
function throughputChart(element) {
  const kept = "flexllm-throughput";
  const fill = (name) => ({ fill: () => soft(name, 9) });
  const chart = new Chart(element, [line("inference", fill("inference")), line("training", fill("training"))], {
    time: true, bottom: 0, empty: "Collecting",
  });
  let points = [];
  try { points = JSON.parse(sessionStorage.getItem(kept)) ?? []; } catch { /* made anew */ }
  const draw = () => {
    if (points.length > 1) chart.show([0, 1, 2].map((i) => points.map((point) => point[i])));
  };
  draw();
  every(async () => {
    const response = await fetch(element.dataset.fleet, { headers: { "hx-request": "true" } });
    if (!response.ok) throw new Error(`status ${response.status}`);
    const now = await response.json();
    const at = Date.now() / 1000;
    points = points.filter((point) => point[0] > at - KEPT_S && point[0] < at);
    points.push([at, now.inference_tokens_per_s, now.finetune_tokens_per_s]);
    sessionStorage.setItem(kept, JSON.stringify(points));
    draw();
    return false;
  });
}

document.addEventListener("DOMContentLoaded", () => {
  const found = (selector, build) => { const element = document.querySelector(selector); if (element) build(element); };
  found("[data-curves]", jobCharts);
  found("#versus", versusCharts);
  found("[data-fleet]", throughputChart);
});
