// Workers: load, what each is believed to hold, what is pinned there.

import { api } from "./api.js";
import { format, h, keyed, legend, set, tile } from "./dom.js";

const PREFIXES = 40; // rows shown per worker

export function workersView() {
  const tiles = { up: tile("Workers up", "good"), running: tile("Running calls"), waiting: tile("Waiting on workers"), pinned: tile("Pinned blocks"),
    balance: tile("Busiest against average") };
  const grid = h("div", { class: "workers" });
  const nothing = h("div", { class: "card empty", hidden: true, text: "No worker. Start the proxy with --worker URL, or add one with POST /helium/workers." });
  const element = h("div", { class: "page" }, h("h1", { text: "Workers" }), h("dl", { class: "tiles" }, Object.values(tiles)), nothing, grid);

  async function poll(signal) {
    const { workers } = await api.workers(signal);
    const sum = (pick) => workers.reduce((acc, worker) => acc + (pick(worker) ?? 0), 0);
    const busiest = Math.max(0, ...workers.map((worker) => worker.running ?? 0));
    tiles.up.value.replaceChildren(format.int(workers.filter((worker) => isUp(worker)).length), h("small", { text: ` of ${workers.length}` }));
    set(tiles.running.value, { text: format.int(sum((worker) => worker.running)) });
    set(tiles.waiting.value, { text: format.int(sum((worker) => worker.waiting)) });
    set(tiles.pinned.value, { text: format.int(sum((worker) => worker.pinned_blocks)) });
    const running = sum((worker) => worker.running);
    set(tiles.balance.value, { text: running ? `${(busiest / (running / workers.length)).toFixed(2)} ×` : "–" });
    set(nothing, { hidden: workers.length > 0 });
    keyed(grid, workers, (worker) => worker.id, makeWorker, updateWorker);
  }

  return { element, poll, show() {} };
}

/** Whether it takes calls: a breaker that is not closed keeps them from a worker that is up. */
const isUp = (worker) => worker.state === "up" && (worker.breaker ?? "closed") === "closed";
const stateOf = (worker) => (worker.state === "up" && !isUp(worker) ? `breaker ${worker.breaker}` : worker.state);

function makeWorker() {
  const parts = { name: h("h2"), state: h("span"), models: h("span"), engine: h("span", { class: "muted" }), url: h("code", { class: "muted" }), resident: h("span", { class: "c-kv" }),
    pinned: h("span", { class: "c-pinned" }), budget: h("i", { title: "pin budget" }), left: h("span"), right: h("span"), prefixes: h("tbody"),
    problem: h("p", { class: "notice", hidden: true }), none: h("p", { class: "muted", text: "Nothing pinned here." }), table: null, facts: h("dl", { class: "facts" }) };
  parts.meter = h("div", { class: "meter", role: "img" }, parts.resident, parts.pinned, parts.budget);
  parts.table = h("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": "Pinned prefixes" }, h("table", {},
    h("thead", {}, h("tr", {}, h("th", { text: "Pinned prefix", scope: "col" }), h("th", { class: "num", text: "Tokens", scope: "col" }), h("th", { class: "num", text: "Blocks", scope: "col" }))), parts.prefixes));
  const body = h("div", { class: "body" }, parts.facts,
    h("div", { class: "kv-row" }, parts.meter, h("p", {}, parts.left, parts.right), legend([["pinned", "pinned"], ["kv", "resident"], ["queued", "┆ pin budget"]])), parts.problem, parts.none);
  const card = h("section", { class: "card" }, h("header", {}, parts.name, parts.state, parts.models, parts.engine, h("span", { class: "grow" }), parts.url), body, parts.table);
  return Object.assign(card, { parts });
}

function updateWorker(card, worker) {
  const { parts } = card;
  const capacity = worker.capacity_blocks || 0;
  const share = (blocks) => (capacity ? Math.min(1, (blocks ?? 0) / capacity) : 0);
  set(card, { "aria-label": `Worker ${worker.id}` });
  set(parts.name, { text: worker.id });
  const shade = worker.state === "up" ? String(worker.breaker).replace("-", "_") : worker.state;
  set(parts.state, { class: `pill ${isUp(worker) ? "ok" : shade}`, text: stateOf(worker) });
  set(parts.engine, { text: [worker.engine, worker.plugin ? "pins" : "", worker.tokenizer === "exact" ? "exact tokens" : ""].filter(Boolean).join(" · ") });
  set(parts.models, { text: worker.models.join(", ") });
  set(parts.url, { text: worker.url.endsWith(`//${worker.id}`) ? "" : worker.url });
  const facts = [["Running", format.int(worker.running)], ["Waiting", format.int(worker.waiting)], ["Preempted", format.int(worker.preemptions)], ["Block size", format.int(worker.block_size)],
    ["Prefill", `${format.tokens(worker.prefill_tokens_per_s)}/s`], ["Decode", `${format.tokens(worker.decode_tokens_per_s)}/s`]];
  keyed(parts.facts, facts, ([term]) => term, ([term]) => h("div", {}, h("dt", { text: term }), h("dd")), (element, [, text]) => set(element.lastChild, { text }));
  set(parts.resident, { "--w": share(worker.resident_blocks) });
  set(parts.pinned, { "--w": share(worker.pinned_blocks) });
  set(parts.budget, { "--w": share(worker.pin_budget_blocks), hidden: !worker.pin_budget_blocks });
  const words = `${format.int(worker.resident_blocks)} of ${format.int(capacity || null)} blocks resident (${format.percent(capacity ? share(worker.resident_blocks) : NaN)})`;
  const pins = `${format.int(worker.pinned_blocks)} of ${format.int(worker.pin_budget_blocks)} pinned`;
  set(parts.meter, { "aria-label": `${words}, ${pins}` });
  set(parts.left, { text: words });
  set(parts.right, { text: pins });
  const pinned = Object.entries(worker.pins ?? {}).slice(0, PREFIXES).map(([name, blocks]) => ({ name, blocks, tokens: blocks * worker.block_size }));
  set(parts.none, { hidden: pinned.length > 0 });
  set(parts.table, { hidden: pinned.length === 0 });
  set(parts.problem, { hidden: !worker.error || isUp(worker), text: worker.error ?? "" });
  keyed(parts.prefixes, pinned, ({ name }) => name, makePrefix, (row, prefix) => {
    set(row.cells[0].firstChild, { text: prefix.name, title: prefix.name });
    set(row.cells[1], { text: format.int(prefix.tokens) });
    set(row.cells[2], { text: format.int(prefix.blocks) });
  });
}

const makePrefix = () => h("tr", {}, h("td", {}, h("code")), h("td", { class: "num" }), h("td", { class: "num" }));
