// Replicas, their ranks, and a map of their KV blocks.

import { bytes, count, element } from "./text.js";

const CELL = 9;
const GAP = 2;

function colour(name) {
  const probe = document.querySelector(`.legend .${name}`);
  return getComputedStyle(probe).backgroundColor;
}

/** Cells fill from below: what is in use, of that what is shared, then what is cached. */
function draw(canvas, map) {
  const width = canvas.clientWidth;
  if (!width || !map.blocks) return;
  const columns = Math.max(1, Math.floor((width + GAP) / (CELL + GAP)));
  const size = (width + GAP) / columns - GAP;
  const height = Math.ceil(map.used.length / columns) * (size + GAP) - GAP;
  const scale = devicePixelRatio || 1;
  canvas.style.height = `${height}px`;
  canvas.width = Math.round(width * scale);
  canvas.height = Math.round(height * scale);
  const pen = canvas.getContext("2d");
  pen.scale(scale, scale);
  const [used, shared, cached, free] = ["used", "shared", "cached", "free"].map(colour);
  map.used.forEach((inUse, index) => {
    const x = (index % columns) * (size + GAP);
    const y = Math.floor(index / columns) * (size + GAP);
    const blocks = Math.min(map.blocks_per_cell, map.blocks - index * map.blocks_per_cell);
    pen.save();
    pen.beginPath();
    pen.roundRect(x, y, size, size, 2);
    pen.clip();
    pen.fillStyle = free;
    pen.fillRect(x, y, size, size);
    let floor = y + size;
    const both = map.shared[index];
    for (const [share, fill] of [[both, shared], [inUse - both, used], [map.cached[index], cached]]) {
      const part = (share / blocks) * size;
      pen.fillStyle = fill;
      pen.fillRect(x, floor - part, size, part);
      floor -= part;
    }
    pen.restore();
  });
}

function ratio(part, whole) {
  return whole ? `${Math.round((100 * part) / whole)} %` : "–";
}

function table(ranks) {
  const staged = ranks.some((rank) => rank.stage);
  const columns = [
    ["rank", (rank) => rank.rank],
    ...(staged ? [["stage", (rank) => rank.stage], ["layers", (rank) => `${rank.layer_start}–${rank.layer_stop - 1}`]] : []),
    ["node", (rank) => rank.node],
    ["device", (rank) => rank.device],
    ["heads", (rank) => (rank.head_stop ? `${rank.head_start}–${rank.head_stop - 1}` : "none")],
    ["weights", (rank) => bytes(rank.weight_bytes), "right"],
    ["KV cache", (rank) => bytes(rank.kv_bytes), "right"],
  ];
  const heads = columns.map(([name, , side = ""]) => element("th", { class: side, scope: "col" }, name));
  const rows = ranks.map((rank) =>
    element("tr", {}, ...columns.map(([, read, side = ""]) => element("td", { class: side }, String(read(rank))))),
  );
  return element("table", {}, element("thead", {}, element("tr", {}, ...heads)), element("tbody", {}, ...rows));
}

function facts(replica) {
  const items = [
    ["running", count(replica.running)],
    ["waiting", count(replica.waiting)],
    ["prefix hits", ratio(replica.prefix_hit_tokens, replica.prefix_queried_tokens)],
    ["preempted", count(replica.preemptions)],
    ["steps", count(replica.steps)],
  ];
  return items.map(([name, value]) => element("div", {}, element("dt", {}, name), element("dd", {}, value)));
}

class Card {
  constructor(id) {
    this.state = element("span");
    this.pill = element("p", { class: "pill" }, element("i"), this.state);
    this.facts = element("dl");
    this.canvas = element("canvas", { role: "img" });
    this.kv = element("span");
    this.tokens = element("span");
    this.ranks = element("div", { class: "ranks", tabindex: "0", role: "group", "aria-label": `Ranks of ${id}` });
    this.root = element(
      "article",
      { class: "card replica", "aria-label": id },
      element("header", {}, element("h3", {}, id), this.pill, this.facts),
      element("figure", { class: "kv" }, element("figcaption", {}, this.kv, this.tokens), this.canvas),
      this.ranks,
    );
    this.known = "";
    new ResizeObserver(() => this.map && draw(this.canvas, this.map)).observe(this.root);
  }

  update(replica) {
    const { kv } = replica;
    this.map = kv.map;
    this.pill.dataset.state = replica.state;
    this.state.textContent = replica.state;
    this.facts.replaceChildren(...facts(replica));
    const text = `${count(kv.used)} in use, ${count(kv.cached)} cached, ${count(kv.free)} free`;
    this.kv.textContent = `KV blocks: ${text}`;
    this.tokens.textContent = kv.total ? `${count(kv.total * kv.block_tokens)} tokens in all` : "";
    this.canvas.setAttribute("aria-label", `KV blocks of ${replica.id}: ${text}`);
    draw(this.canvas, kv.map);
    const ranks = JSON.stringify(replica.ranks);
    if (ranks !== this.known) {
      this.known = ranks;
      this.ranks.replaceChildren(table(replica.ranks));
    }
  }
}

/** Cards in `place`; returns a function that takes the cluster. */
export function replicas(place) {
  const cards = new Map();
  return (cluster) => {
    for (const replica of cluster.replicas) {
      if (!cards.has(replica.id)) {
        const card = new Card(replica.id);
        cards.set(replica.id, card);
        place.append(card.root);
      }
      cards.get(replica.id).update(replica);
    }
  };
}
