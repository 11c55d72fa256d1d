"use strict";
// Fetches `status` each second and shows it. Names come from foreign repositories: they are shown as text, never as HTML.

const POLL = 1; // seconds between two requests
const PATIENCE = 5; // seconds until a request times out
const RATE = 5; // seconds over which rates are computed
const WINDOW = 60; // seconds over which quantiles are computed
const HISTORY = 120; // seconds that the line charts show
const TOKEN = "lorarep-token";

const CATEGORIES = {
  base_weights: "Base weights",
  quantization_constants: "Quantization constants",
  embeddings_and_head: "Embeddings and head",
  adapters: "Adapters",
  kv_cache: "KV cache",
  workspace: "Workspace",
};
const TIERS = { device: "On the device", host: "In host memory", disk: "On disk" };

let history = []; // the last statuses, the oldest first
let points = []; // the points of the line charts: {time, tokens, running, first, between}
let drawn = ""; // the stacks of the current picture, as JSON
let seen = null; // the time of the last status
let poll = 0; // the timer of the next request

const at = (id) => document.getElementById(id);

function say(id, text) {
  if (at(id).textContent !== text) at(id).textContent = text; // an unchanged text would be read out again by screen readers
}

function make(name, attributes, ...children) {
  const svg = ["svg", "rect", "line"].includes(name);
  const element = svg ? document.createElementNS("http://www.w3.org/2000/svg", name) : document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  element.append(...children);
  return element;
}

// Numbers for people.

const plural = (n, one) => `${n.toLocaleString("en")} ${one}${n === 1 ? "" : "s"}`;

function bytes(n) {
  let power = 0;
  while (n >= 1024 && power < 4) [n, power] = [n / 1024, power + 1];
  return `${n.toFixed(power && n < 100 ? 1 : 0)}\u00a0${["B", "KiB", "MiB", "GiB", "TiB"][power]}`;
}

function seconds(s) {
  if (s === null) return "–";
  return s < 0.9995 ? `${(1000 * s).toFixed(s < 0.01 ? 1 : 0)}\u00a0ms` : `${s.toFixed(s < 10 ? 2 : 0)}\u00a0s`;
}

const number = (n) => (n === null ? "–" : n < 10 && n > 0 ? n.toFixed(1) : Math.round(n).toLocaleString("en"));

function age(s) {
  if (s < 60) return `${Math.round(s)} s`;
  if (s < 3600) return `${Math.floor(s / 60)} min`;
  return s < 172800 ? `${Math.floor(s / 3600)} h` : `${Math.floor(s / 86400)} days`;
}

// Rates and quantiles between two statuses.

/** The oldest status of the last `window` seconds. The newest status if there is no other. */
function since(window) {
  const now = history.at(-1).time;
  return history.find((status) => status.time >= now - window);
}

/** The rate of a count, per second. Null until there are two statuses. */
function rate(count) {
  const [before, now] = [since(RATE), history.at(-1)];
  return now.time > before.time ? (count(now) - count(before)) / (now.time - before.time) : null;
}

/** Quantile q of a latency over WINDOW, interpolated in its bucket as Prometheus does. Null without requests. */
function quantile(q, latency) {
  const [before, now] = [since(WINDOW).latency[latency], history.at(-1).latency[latency]];
  const buckets = Object.entries(now)
    .map(([bound, n]) => [bound === "+Inf" ? Infinity : Number(bound), n - before[bound]])
    .sort((a, b) => a[0] - b[0]);
  const total = buckets.at(-1)[1];
  if (!total) return null;
  let [low, below] = [0, 0];
  for (const [bound, n] of buckets) {
    if (n >= q * total) return bound === Infinity ? low : low + ((bound - low) * (q * total - below)) / (n - below);
    [low, below] = [bound, n];
  }
}

const sum = (values) => values.reduce((a, b) => a + b, 0);
const steps = (status) => sum(Object.values(status.stats.step_rows));
const rows = (status) => sum(Object.entries(status.stats.step_rows).map(([size, n]) => size * n));
const requests = (latency) => history.at(-1).latency[latency]["+Inf"] - since(WINDOW).latency[latency]["+Inf"];

// The parts of the page.

function showHead({ base, started }) {
  document.title = `${base.repository} · lorarep`;
  say("base", base.repository);
  const kind = base.quantization === "none" ? base.dtype : `${base.quantization}, ${base.dtype}`;
  const up = age(Math.max(0, Date.now() / 1000 - started));
  say("how", `${plural(base.layers, "layer")} · ${kind} · ${base.device} · ${base.commit.slice(0, 12)} · up ${up}`);
}

function showTiles(status) {
  const { stats } = status;
  const perSecond = rate(steps);
  const point = {
    time: status.time,
    tokens: rate((s) => s.stats.tokens_out),
    running: stats.running,
    first: quantile(0.5, "first_token"),
    between: quantile(0.5, "output_token"),
  };
  points = [...points.filter((p) => p.time >= status.time - HISTORY), point];
  say("tokens", number(point.tokens));
  const most = Math.max(...points.map((p) => p.tokens ?? 0));
  say("tokens-more", `peak ${number(most)} · prompts ${number(rate((s) => s.stats.tokens_in))} tokens/s`);
  say("running", stats.running.toLocaleString("en"));
  const together = perSecond ? ` · ${number(rate(rows) / perSecond)} rows a step` : "";
  say("running-more", `${stats.waiting.toLocaleString("en")} waiting${together}`);
  say("first", seconds(point.first));
  say("first-more", `p95 ${seconds(quantile(0.95, "first_token"))} · ${plural(requests("first_token"), "answer")}/min`);
  say("between", seconds(point.between));
  say("between-more", `p95 ${seconds(quantile(0.95, "output_token"))} · ${number(perSecond)} steps/s`);
  for (const key of ["tokens", "running", "first", "between"]) showLine(`${key}-line`, key);
}

/** Draws a value's line chart over HISTORY in a box of 1 by 1. The newest point is at the right edge. */
function showLine(id, key) {
  const now = points.at(-1).time;
  const most = Math.max(...points.map((p) => p[key] ?? 0)) || 1;
  let path = "";
  let last = -Infinity; // no line is drawn across a gap
  for (const point of points.filter((p) => p[key] !== null)) {
    const pen = point.time - last > PATIENCE ? "M" : "L";
    path += `${pen}${(1 - (now - point.time) / HISTORY).toFixed(4)} ${(1 - point[key] / most).toFixed(4)}`;
    last = point.time;
  }
  at(id).firstElementChild.setAttribute("d", path);
}

function showStacks({ base, stacks }) {
  const now = JSON.stringify([base.layers, stacks]);
  if (now === drawn) return;
  drawn = now;
  const deepest = Math.max(...stacks.map((stack) => stack.layers.length));
  at("stacks").replaceChildren(...stacks.map((stack) => picture(stack, base.layers, deepest)));
}

/** The picture of a stack: positions from left to right, layers from the bottom up. All pictures have the same scales. */
function picture({ names, layers, ranges, adapters }, height, width) {
  const svg = make("svg", { viewBox: `0 0 ${width} ${height}`, preserveAspectRatio: "none", role: "img" });
  svg.append(make("rect", { class: "ground", x: 0, y: 0, width: layers.length, height }));
  const count = new Map();
  for (const layer of layers) count.set(layer, (count.get(layer) ?? 0) + 1);
  for (const [layer, n] of count) {
    if (n > 1) svg.append(make("rect", { class: "band", x: 0, y: height - 1 - layer, width: layers.length, height: 1 }));
  }
  const seenLayers = new Set();
  layers.forEach((layer, position) => {
    const mark = seenLayers.has(layer) ? "again" : "walk";
    svg.append(make("rect", { class: mark, x: position + 0.05, y: height - layer - 0.95, width: 0.9, height: 0.9 }));
    if (position && layer !== layers[position - 1] + 1) {
      svg.append(make("line", { class: "jump", x1: position, x2: position, y1: 0, y2: height }));
    }
    seenLayers.add(layer);
  });
  const notation = JSON.stringify(ranges);
  const replicas = layers.length - count.size;
  const depth = `${plural(layers.length, "position")}${replicas ? `, ${replicas} of them again` : ""}`;
  const title = names.length ? names.join(", ") : notation;
  svg.setAttribute("aria-label", `${title}: ${depth}, layers ${notation}`);
  const across = make("div", { class: "axis across", "aria-hidden": "true" });
  across.append(make("span", {}, "position 0"), make("span", {}, `${layers.length - 1}`));
  across.style.width = `${(100 * layers.length) / width}%`;
  const said = [depth, plural(adapters, "adapter")];
  if (names.length) said.unshift(notation);
  return make(
    "figure",
    {},
    make("h3", {}, title),
    make("figcaption", {}, said.join(" · ")),
    make("div", { class: "axis up", "aria-hidden": "true" }, make("span", {}, `layer ${height - 1}`), make("span", {}, "0")),
    svg,
    across,
  );
}

function showMemory({ memory, peft_bytes: peft, stats }) {
  const total = sum(Object.values(memory));
  const used = stats.pages_used / stats.pages_total;
  const part = (category, size, more = "") => {
    const segment = make("div", { class: `${category}${more}` });
    segment.style.flexGrow = size;
    return segment;
  };
  const segments = [];
  const legend = [];
  for (const [category, size] of Object.entries(memory)) {
    if (category === "kv_cache") {
      segments.push(part(category, size * used), part(category, size * (1 - used), " free"));
    } else {
      segments.push(part(category, size));
    }
    const of = category === "kv_cache" ? ` (${(100 * used).toFixed(used && used < 0.1 ? 1 : 0)} % used)` : "";
    legend.push(
      make(
        "div",
        {},
        make("dt", {}, make("span", { class: `key ${category}` }), `${CATEGORIES[category] ?? category}${of}`),
        make("dd", {}, bytes(size)),
      ),
    );
  }
  say("memory-total", bytes(total));
  at("bar").replaceChildren(...segments);
  at("memory").replaceChildren(...legend);
  const own = total - (memory.kv_cache ?? 0);
  say("peft", `${bytes(own)} without the KV cache; a PEFT model for each stack would hold ${bytes(peft)}.`);
}

function showAdapters({ adapters, adapters_total: total, tiers, stacks }) {
  const groups = Object.keys(TIERS).map((tier) => [TIERS[tier], tiers[tier], adapters.filter((a) => a.tier === tier)]);
  const absent = adapters.filter((a) => a.state !== "loaded");
  if (absent.length) groups.unshift(["Not loaded", total - sum(Object.values(tiers)), absent]);
  say("adapters-total", plural(total, "adapter"));
  at("tiers").replaceChildren(
    ...groups.map(([title, n, shown]) => {
      const list = make("ul", {}, ...shown.map((adapter) => entry(adapter, stacks)));
      if (n > shown.length) list.append(make("li", {}, make("span", { class: "quiet" }, `and ${(n - shown.length).toLocaleString("en")} more`)));
      return make("div", {}, make("h3", {}, `${title} `, make("span", { class: "quiet" }, n.toLocaleString("en"))), list);
    }),
  );
}

function entry(adapter, stacks) {
  const item = make("li", {}, make("span", { class: "name", title: adapter.name }, adapter.name));
  if (adapter.references) {
    const noun = adapter.references === 1 ? " request" : " requests";
    item.append(make("span", { class: "busy" }, `▶ ${adapter.references}`, make("span", { class: "unseen" }, noun)));
  }
  if (adapter.state === "loaded") {
    const kind = { lora: "LoRA", dora: "DoRA" }[adapter.kind] ?? adapter.kind;
    const said = [`${kind} r${adapter.rank}`, `${stacks[adapter.stack].layers.length} positions`];
    if (adapter.bytes) said.push(bytes(adapter.bytes));
    if (adapter.pinned) said.push("pinned");
    item.append(make("span", { class: "quiet" }, said.join(" · ")));
  } else {
    item.append(make("span", { class: "quiet" }, `${adapter.state} · ${adapter.repository}`));
  }
  if (adapter.error) item.append(make("span", { class: "error" }, adapter.error));
  return item;
}

// Requests.

function show(status) {
  if (history.length && history[0].started !== status.started) [history, points] = [[], []]; // the status comes from another server
  history = [...history.filter((s) => s.time >= status.time - WINDOW), status];
  showHead(status);
  showTiles(status);
  showStacks(status);
  showMemory(status);
  showAdapters(status);
}

function setState(state, text) {
  document.body.dataset.state = state;
  say("state", text);
}

async function ask() {
  const token = sessionStorage.getItem(TOKEN);
  const headers = token === null ? {} : { Authorization: `Bearer ${token}` };
  let response;
  try {
    response = await fetch("status", { headers, cache: "no-store", signal: AbortSignal.timeout(1000 * PATIENCE) });
    const answer = await response.json();
    if (response.status === 401) {
      setState("refused", token === null ? "a token is needed" : "the token is not known");
      return false;
    }
    if (!response.ok) {
      setState("stale", answer.error.message);
      return true;
    }
    show(answer);
    seen = new Date();
    setState("live", "live");
  } catch {
    setState("stale", seen === null ? "the server cannot be reached" : `not reached since ${seen.toLocaleTimeString()}, trying again`);
  }
  return true;
}

async function run() {
  clearTimeout(poll);
  poll = 0;
  // A hidden page makes no requests.
  if (document.hidden) return;
  const again = await ask();
  at("ask").hidden = again;
  if (again && !poll) poll = setTimeout(run, 1000 * POLL);
}

at("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  sessionStorage.setItem(TOKEN, at("token").value.trim());
  at("token").value = "";
  run();
});
document.addEventListener("visibilitychange", run);
run();
