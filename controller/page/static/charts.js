// Lines over the last minutes, as SVG.

import { count, duration, element } from "./text.js";

const WINDOWS_S = [60, 120, 300];
const JOINED_S = 12;
const MARGIN = { left: 38, right: 4, top: 8, bottom: 16 };
const NS = "http://www.w3.org/2000/svg";

function shape(name, attributes, text = "") {
  const made = document.createElementNS(NS, name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  if (text) made.textContent = text;
  return made;
}

/** A round number that is at least `value`. */
function ceiling(value) {
  if (value <= 0) return 1;
  const power = 10 ** Math.floor(Math.log10(value));
  return [1, 2, 4, 6, 10].find((step) => step * power >= value) * power;
}

export const rate = (value) => [count(value), ""];
export const seconds = duration;

class Chart {
  /** series: [{name, field}], the first one drawn strong. format: value to [text, unit]. */
  constructor(name, unit, series, format) {
    Object.assign(this, { name, unit, series, format, samples: [], cursor: null });
    this.svg = shape("svg", { tabindex: "0", role: "img" });
    this.now = element("span", { class: "now" });
    this.key = element("span", { class: "key" });
    this.root = element(
      "figure",
      { class: "card chart" },
      element("figcaption", {}, element("span", { class: "name" }, name), this.now, this.key),
      this.svg,
    );
    new ResizeObserver(() => this.draw()).observe(this.svg);
    this.svg.addEventListener("pointermove", (event) => this.point(event.offsetX));
    this.svg.addEventListener("pointerleave", () => this.point(null));
    this.svg.addEventListener("blur", () => this.point(null));
    this.svg.addEventListener("keydown", (event) => {
      const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
      if (!step || !this.samples.length) return;
      event.preventDefault();
      const last = this.samples.length - 1;
      this.cursor = Math.min(last, Math.max(0, (this.cursor ?? last + (step < 0 ? 1 : 0)) + step));
      this.draw();
    });
  }

  update(samples) {
    this.samples = samples;
    this.draw();
  }

  point(x) {
    this.cursor = null;
    if (x !== null && this.samples.length) {
      const at = this.samples.map((sample) => Math.abs(this.x(sample.time_s) - x));
      this.cursor = at.indexOf(Math.min(...at));
    }
    this.draw();
  }

  x(time) {
    const end = this.samples.at(-1).time_s;
    return MARGIN.left + this.inner * (1 - (end - time) / this.window);
  }

  label(value) {
    if (value === null || value === undefined) return "–";
    const [text, unit] = this.format(value);
    return `${text} ${unit || this.unit}`.trim();
  }

  caption(sample) {
    const value = sample?.[this.series[0].field];
    const [text, unit] = value === null || value === undefined ? ["–", ""] : this.format(value);
    this.now.replaceChildren(text, element("small", {}, unit || this.unit));
    const ago = this.cursor === null ? 0 : this.samples.at(-1).time_s - sample.time_s;
    const texts = this.series.length > 1 ? this.series.map(({ name, field }) => `${name} ${this.label(sample?.[field])}`) : [];
    const parts = texts.map((item) => element("span", {}, element("i"), item));
    if (this.cursor !== null) parts.push(`${Math.round(ago)} s ago`);
    this.key.replaceChildren(...parts);
    this.svg.setAttribute("aria-label", `${this.name}: ${texts.join(", ") || this.label(value)}`);
  }

  draw() {
    const width = this.svg.clientWidth;
    const height = this.svg.clientHeight;
    const shown = this.cursor === null ? this.latest() : this.samples[this.cursor];
    this.caption(shown);
    if (!width) return;
    const span = this.samples.length ? this.samples.at(-1).time_s - this.samples[0].time_s : 0;
    this.window = WINDOWS_S.find((item) => item >= span) ?? WINDOWS_S.at(-1);
    this.inner = width - MARGIN.left - MARGIN.right;
    const values = this.samples.flatMap((sample) => this.series.map(({ field }) => sample[field] ?? 0));
    const top = ceiling(Math.max(0, ...values) * 1.05);
    const y = (value) => height - MARGIN.bottom - (height - MARGIN.top - MARGIN.bottom) * (value / top);
    const nodes = [];
    for (const part of [0, 0.5, 1]) {
      const [text, unit] = this.format(part * top);
      const at = y(part * top);
      nodes.push(shape("line", { class: "rule", x1: MARGIN.left, x2: width - MARGIN.right, y1: at, y2: at }));
      const whole = unit || part * top >= 1 ? text.replace(/\.0+$/, "") : part * top;
      const words = part === 0 ? "0" : `${whole}${unit}`;
      nodes.push(shape("text", { x: MARGIN.left - 6, y: at + 3.5, "text-anchor": "end" }, words));
    }
    nodes.push(shape("text", { x: MARGIN.left, y: height - 2 }, `${this.window / 60} min ago`));
    nodes.push(shape("text", { x: width - MARGIN.right, y: height - 2, "text-anchor": "end" }, "now"));
    if (this.samples.length) {
      [...this.series].reverse().forEach(({ field }) => nodes.push(...this.line(field, y)));
      if (this.cursor !== null) {
        const at = this.x(shown.time_s);
        nodes.push(shape("line", { class: "cursor", x1: at, x2: at, y1: MARGIN.top, y2: height - MARGIN.bottom }));
      }
    }
    this.svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
    this.svg.replaceChildren(...nodes);
  }

  /** The last sample that has a value, not older than a quarter of a minute. */
  latest() {
    const recent = this.samples.slice(-15);
    return recent.findLast((sample) => sample[this.series[0].field] !== null) ?? this.samples.at(-1);
  }

  line(field, y) {
    const runs = [[]];
    let last = Infinity;
    for (const sample of this.samples) {
      const value = sample[field];
      const age = this.samples.at(-1).time_s - sample.time_s;
      if (value === null || age > this.window) continue;
      if (sample.time_s - last > JOINED_S) runs.push([]);
      runs.at(-1).push([this.x(sample.time_s), y(value)]);
      last = sample.time_s;
    }
    const second = field !== this.series[0].field;
    const nodes = [];
    for (const run of runs.filter((points) => points.length)) {
      const path = run.map(([a, b], index) => `${index ? "L" : "M"}${a.toFixed(1)} ${b.toFixed(1)}`).join("");
      const ends = run.length === 1 ? "h0.1" : "";
      if (!second && run.length > 1) {
        const base = y(0).toFixed(1);
        nodes.push(shape("path", { class: "area", d: `${path}L${run.at(-1)[0].toFixed(1)} ${base}L${run[0][0].toFixed(1)} ${base}Z` }));
      }
      nodes.push(shape("path", { class: second ? "line second" : "line", d: path + ends }));
    }
    return nodes;
  }
}

/** The four charts, put into `place`; returns a function that takes the samples. */
export function charts(place) {
  const percentiles = (kind) => [
    { name: "median", field: `${kind}_p50_s` },
    { name: "p95", field: `${kind}_p95_s` },
  ];
  const all = [
    new Chart("Output", "tokens/s", [
      { name: "output", field: "output_tokens" },
      { name: "with prompts", field: "computed_tokens" },
    ], rate),
    new Chart("Requests", "running", [
      { name: "running", field: "running" },
      { name: "waiting", field: "waiting" },
    ], rate),
    new Chart("Time to first token", "", percentiles("first_token"), seconds),
    new Chart("Between tokens", "", percentiles("inter_token"), seconds),
  ];
  all[1].label = (value) => count(value ?? 0);
  all[0].label = (value) => count(value ?? 0);
  place.append(...all.map((chart) => chart.root));
  return (samples) => all.forEach((chart) => chart.update(samples));
}
