// The curves: of one job, of two versions side by side, and of what the workers do now.
"use strict";

const POLL_MS = 2000;
const KEPT_S = 600; // of throughput
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

const ticks = (_, values) => values.map((value) => {
  const text = compact(value);
  return text.includes("e") ? value.toExponential(0).replace("e-", "e−") : text;
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

// A chart that fills its element, follows its width and the colour scheme, and says when it has no data.
class Chart {
  constructor(element, series, { sync, time = false, describe, bottom = null, empty = "No step yet" } = {}) {
    this.element = element;
    this.describe = describe;
    this.note = Object.assign(document.createElement("div"), { className: "chart-empty", textContent: empty });
    element.append(this.note);
    this.data = [[], ...series.map(() => [])];
    this.plot = new uPlot({
      ...this.size(),
      scales: { x: { time }, y: { range: (_, low, high) => Chart.range(low, high, bottom) } },
      axes: [axis({ size: 26, gap: 4, space: 70, ...(time ? {} : { values: ticks }) }), axis({ size: 52, gap: 6, space: 34, values: ticks })],
      series: [{}, ...series],
      legend: { show: false },
      cursor: { y: false, points: { size: 6 }, ...(sync ? { sync: { key: sync } } : {}) },
      hooks: { setCursor: [() => this.report()] },
    }, this.data, element);
    new ResizeObserver(() => this.plot.setSize(this.size())).observe(element);
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => this.plot.redraw());
  }

  static range(low, high, bottom) {
    if (low == null) return [0, 1];
    const pad = (high - low || Math.abs(high) || 1) * 0.08;
    return [bottom ?? low - pad, high + pad];
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
    this.note.hidden = data.slice(1).some((values) => values.some((value) => value != null));
    this.plot.setData(data);
    this.report();
  }

  // Under the cursor, else the newest.
  report() {
    if (!this.describe || !this.plot) return;
    const under = this.plot.cursor.idx;
    this.describe((column) => {
      const values = this.data[column];
      if (under != null) return values[under];
      return values.findLast((value) => value != null);
    }, under == null ? null : this.data[0][under]);
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

const every = (work) => {
  const turn = async () => {
    let isOver = false;
    if (!document.hidden) {
      try { isOver = await work(); } catch { /* the banner says it; try again */ }
    }
    if (!isOver) setTimeout(turn, POLL_MS);
  };
  turn();
};

function jobCharts(root) {
  const curves = new Curves(root.dataset.curves);
  const box = (name) => root.querySelector(`[data-chart="${name}"]`);
  const now = (name) => root.querySelector(`[data-now="${name}"]`);
  const dots = { points: { show: true, size: 5 } };
  const make = (name, series, options) => new Chart(box(name), series, { sync: "job", ...options });
  const pair = (raw, mean, validation, digits) => (at, step) => {
    const text = (value) => (value == null ? "–" : value.toFixed(digits));
    const parts = [text(at(step == null ? mean : raw)), text(at(validation))];
    return (step == null ? "" : `step ${step}: `) + parts.join(" · ");
  };
  const both = [line("training", { stroke: () => soft("training", 30), width: 1 }), line("training"), line("inference", dots)];
  const single = (name) => {
    const output = now(name);
    const describe = (at, step) => { output.textContent = (step == null ? "" : `step ${step}: `) + compact(at(1)); };
    return make(name, [line("muted", { width: 1.4, stroke: () => soft("text", 65) })], { describe });
  };
  const paired = (name, digits) => {
    const output = now(name);
    const words = pair(1, 2, 3, digits);
    return make(name, both, { describe: (at, step) => { output.textContent = words(at, step); } });
  };
  const loss = paired("loss", 3);
  const accuracy = paired("accuracy", 3);
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

function versusChart(element) {
  const { left, right, leftName, rightName } = element.dataset;
  const dots = { points: { show: true, size: 5 } };
  const chart = new Chart(element, [line("inference", { ...dots, label: leftName }), line("training", { ...dots, label: rightName })], { empty: "Trained without a validation file" });
  const both = [new Curves(left), new Curves(right)];
  const points = (columns) => [columns.step, columns.valid_loss];
  Promise.all(both.map((curves) => curves.fetch())).then(() => {
    chart.show(uPlot.join(both.map((curves) => points(curves.columns()))));
  }).catch(() => { chart.note.textContent = "The curves cannot be read now"; });
}

// Kept over page loads, so that a look at a job does not empty the chart.
function throughputChart(element) {
  const kept = "flexllm-throughput";
  const fill = (name) => ({ fill: () => soft(name, 12) });
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
  found("#versus", versusChart);
  found("[data-fleet]", throughputChart);
});
