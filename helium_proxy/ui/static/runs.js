// Runs: the newest on the left, one in full on the right.

import { api } from "./api.js";
import { counted, format, h, keyed, legend, newStack, pill, set, stack, tile } from "./dom.js";
import { dagView } from "./dag.js";
import { ganttView } from "./gantt.js";
import { criticalSeconds, FATES, KINDS, readRun, runClock } from "./model.js";

const HINT = `export OPENAI_BASE_URL=${location.origin}/v1\npython your_agent.py`;

export function runsView() {
  const list = h("ul", { class: "list" });
  const workflow = h("input", { type: "search", placeholder: "workflow", "aria-label": "Filter by workflow", oninput: () => wake() });
  const liveOnly = h("button", { type: "button", text: "Live", "aria-pressed": "false", onclick: () => {
    set(liveOnly, { "aria-pressed": String(liveOnly.getAttribute("aria-pressed") !== "true") });
    wake();
  } });
  const count = h("span");
  const pane = runPane();
  const nothing = h("div", { class: "card empty", hidden: true }, h("p", { text: "No run yet. Point an agent at this proxy:" }), h("code", { text: HINT }));
  const unseen = h("div", { class: "card empty", hidden: true, text: "No run is seen in passthrough mode: calls go to the least loaded worker as they come." });
  const unmatched = h("div", { class: "card empty", hidden: true }, h("p", { text: "No run matches the filter." }));
  const element = h("div", { class: "split" },
    h("aside", { class: "side", "aria-label": "Runs" }, h("h2", {}, "Runs", count), h("div", { class: "filters" }, workflow, liveOnly), list),
    h("div", { class: "detail" }, nothing, unseen, unmatched, pane.element));

  let wanted = ""; // the run named by the address; empty: follow the newest
  let wake = () => {};
  const debounce = () => window.dispatchEvent(new HashChangeEvent("hashchange"));
  wake = debounce;

  async function poll(signal) {
    const state = liveOnly.getAttribute("aria-pressed") === "true" ? "live" : "";
    const name = workflow.value.trim();
    const { runs, mode } = await api.runs({ workflow: name, state }, signal);
    const shown = wanted || runs[0]?.run || "";
    set(count, { text: runs.length ? String(runs.length) : "" });
    keyed(list, runs, (run) => `${run.started_at} ${run.run}`, makeItem, (item, run) => updateItem(item, run, shown));
    const passthrough = mode === "passthrough";
    set(unseen, { hidden: Boolean(shown) || !passthrough });
    set(nothing, { hidden: Boolean(shown || name || state) || passthrough });
    set(unmatched, { hidden: Boolean(shown) || !(name || state) || passthrough });
    set(pane.element, { hidden: !shown });
    if (shown) await pane.poll(shown, runs.find((run) => run.run === shown), signal);
  }

  return { element, poll, show: (run) => { wanted = run; } };
}

function makeItem(run) {
  const parts = { name: h("strong"), state: h("span"), bar: newStack(), sub: h("small"), calls: h("small") };
  const link = h("a", { class: "item", href: `#/runs/${encodeURIComponent(run.run)}` },
    h("span", { class: "row" }, parts.name, parts.state), parts.bar, h("span", { class: "row" }, parts.sub, parts.calls));
  return Object.assign(h("li", {}, link), { link, parts });
}

function updateItem(item, run, shown) {
  const { parts, link } = item;
  const { fates } = run;
  const ended = fates.computed + fates.hit + fates.coalesced + fates.error;
  set(link, { "aria-current": run.run === shown ? "true" : null });
  set(parts.name, { text: run.workflow || "unnamed" });
  set(parts.state, { class: `pill ${run.state}`, text: run.state });
  set(parts.sub, { text: run.run, title: run.run, class: "mono" });
  set(parts.calls, { text: counted(run.calls, "call") });
  stack(parts.bar, [["computed", fates.computed, "computed"], ["coalesced", fates.coalesced, "coalesced"], ["hit", fates.hit, "prompt cache"],
    ["error", fates.error, "error"], ["queued", Math.max(0, run.calls - ended), "to do"]]);
}

function runPane() {
  let run = null; // what is drawn
  let clock = runClock();
  let lastAt = null; // when something last happened in it, as the list had it
  let chosen = null; // id of the call that the inspector shows

  const choose = (call) => {
    chosen = call === chosen ? null : call;
    draw();
  };
  const title = { workflow: h("h1"), id: h("span", { class: "muted mono" }), state: h("span") };
  const tiles = { calls: tile("Calls"), reused: tile("Prompt reused", "good"), tokens: tile("Prompt tokens by fate", "wide"),
    span: tile("Makespan"), path: tile("Critical path"), waited: tile("Queue wait, all calls") };
  const tokensBar = newStack(true);
  const tokensText = h("small");
  tiles.tokens.value.replaceWith(h("dd", {}, tokensBar, tokensText));
  const dag = dagView({ label: "Calls of the run", onselect: choose });
  const gantt = ganttView({ label: "Timeline by worker", onselect: choose });
  const inspector = h("aside", { class: "inspector", hidden: true, "aria-live": "polite" });
  const expected = h("ul", { class: "upcoming", "aria-label": "Still expected" });
  const body = h("tbody");
  const heads = [["Call"], ["Fate"], ["Worker"], ["Prompt", 1], ["Cached", 1], ["Predicted", 1], ["Output", 1], ["Queue", 1], ["First token", 1], ["Total", 1]];
  const element = h("div", { class: "detail" },
    h("div", { class: "title" }, title.workflow, title.state, title.id),
    h("dl", { class: "tiles" }, Object.values(tiles)),
    h("section", { class: "card", "aria-label": "Graph" },
      h("header", {}, h("h2", { text: "Graph" }), legend(KINDS), h("span", { class: "grow" }), dag.tools), dag.element, expected, inspector),
    h("section", { class: "card", "aria-label": "Timeline" },
      h("header", {}, h("h2", { text: "Timeline" }), legend([["queued", "waiting ┄"], ["computed", "prefill, then decode (paler)"], ["pinned", "critical path"]])), gantt.element),
    h("section", { class: "card", "aria-label": "Calls" }, h("header", {}, h("h2", { text: "Calls" })),
      h("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": "Table of calls" }, h("table", {}, h("thead", {}, h("tr", {}, heads.map(([text, right]) => h("th", { text, scope: "col", class: right ? "num" : null })))), body))));

  /** `summary`: the run as the list has it. One that has ended, and is drawn, is not asked for again. */
  async function poll(id, summary, signal) {
    if (run?.id !== id) {
      clock = runClock();
      chosen = null;
      dag.follow();
    } else if (!run.live && (!summary || (summary.state === "done" && summary.last_at === lastAt))) return;
    lastAt = summary?.last_at;
    const json = await api.run(id, signal);
    run = readRun(json, clock(json, performance.now() / 1000));
    draw();
  }

  function draw() {
    set(title.workflow, { text: run.workflow || "unnamed workflow" });
    set(title.id, { text: run.id });
    set(title.state, { class: `pill ${run.state}`, text: run.state });
    tiles.calls.value.replaceChildren(format.int(run.done), h("small", { text: ` of ${format.int(run.nodes.length)}${run.errors ? ` · ${run.errors} failed` : ""}` }));
    set(tiles.reused.value, { text: format.percent(run.reused) });
    stack(tokensBar, FATES.map(([kind, text]) => [kind, run.tokens[kind], text]));
    const words = FATES.filter(([kind]) => run.tokens[kind]).map(([kind, text]) => `${format.tokens(run.tokens[kind])} ${text}`);
    set(tokensText, { text: words.join(" · ") || "nothing yet" });
    set(tiles.span.value, { text: format.seconds(run.end - run.start) });
    set(tiles.path.value, { text: format.seconds(criticalSeconds(run)) });
    set(tiles.waited.value, { text: format.seconds(run.waited) });
    dag.update(graphOf(run), chosen);
    gantt.update(timelineOf(run), chosen);
    keyed(body, run.nodes, (node) => node.call, (node) => makeRow(node, choose), updateRow);
    set(expected, { hidden: run.expected.length === 0 });
    keyed(expected, byNode(run.expected), ([node]) => node, ([node]) => h("li", { class: "pill expected" }, node, h("b")), (item, [, calls]) => set(item.lastChild, { text: ` × ${calls}` }));
    inspect();
  }

  function updateRow(row, node) {
    const waited = node.started_at != null && node.queued_at != null ? node.started_at - node.queued_at : null;
    const first = node.first_token_at != null ? node.first_token_at - (node.queued_at ?? node.started_at) : null;
    const whole = node.finished_at != null ? node.finished_at - (node.queued_at ?? node.started_at) : null;
    set(row, { class: node.call === chosen ? "selected" : null });
    set(row.cells[1].firstChild, { class: `pill ${node.kind}`, text: node.kind === "hit" ? "prompt cache" : node.kind });
    const values = [node.worker ?? "–", format.int(node.prompt_tokens), format.int(node.cached_tokens), format.int(node.predicted_cached_tokens),
      format.int(node.output_tokens), format.seconds(waited), format.seconds(first), format.seconds(whole)];
    values.forEach((text, index) => set(row.cells[index + 2], { text }));
  }

  function inspect() {
    const node = run.nodes.find((one) => one.call === chosen);
    set(inspector, { hidden: !node });
    if (!node) return;
    const facts = [["worker", node.worker ?? "–"], ["prompt", `${format.int(node.prompt_tokens)} tokens`], ["cached", `${format.int(node.cached_tokens)} tokens`],
      ["predicted", `${format.int(node.predicted_cached_tokens)} cached`], ["output", `${format.int(node.output_tokens)} tokens`],
      ["queued at", format.seconds(node.queued_at - run.start)], ["started", node.started_at == null ? "–" : `+${format.seconds(node.started_at - run.start)}`],
      ["finished", node.finished_at == null ? "–" : `+${format.seconds(node.finished_at - run.start)}`]];
    inspector.replaceChildren(
      h("header", {}, h("strong", { text: node.node }), pill(node.kind), h("button", { type: "button", "aria-label": "Close", text: "×", onclick: () => choose(chosen) })),
      h("dl", {}, facts.map(([term, text]) => [h("dt", { text: term }), h("dd", { text })])),
      h("small", { class: "muted mono", text: node.call }));
  }

  return { element, poll };
}

/** [node, calls still expected], whatever the turn of a loop. */
function byNode(expected) {
  const calls = new Map();
  for (const call of expected) calls.set(call.node, (calls.get(call.node) ?? 0) + call.calls);
  return [...calls];
}

function makeRow(node, choose) {
  return h("tr", {}, h("td", {}, h("button", { type: "button", text: node.node, onclick: () => choose(node.call) })), h("td", {}, h("span")),
    h("td", { class: "mono" }), Array.from({ length: 7 }, () => h("td", { class: "num" })));
}

function describe(node) {
  const parts = [node.node, node.kind === "hit" ? "prompt cache" : node.kind];
  if (node.worker) parts.push(`on ${node.worker}`);
  if (node.prompt_tokens != null) parts.push(`${node.prompt_tokens} prompt tokens, ${node.cached_tokens ?? 0} cached`);
  return parts.join(", ");
}

/** The colour of a call: a computed one whose prompt came mostly from the KV cache is shown as such. */
const cachedShare = (node) => (node.kind === "computed" && node.prompt_tokens ? (node.cached_tokens ?? 0) / node.prompt_tokens : null);
const tone = (node) => (cachedShare(node) >= 0.5 ? "kv" : node.kind);

function graphOf(run) {
  const nodes = run.nodes.map((node) => {
    const share = cachedShare(node);
    const sub = node.prompt_tokens == null ? node.kind : `${format.tokens(node.prompt_tokens)} tok${share === null ? "" : ` · ${format.percent(share)} cached`}`;
    return { id: node.call, name: node.node, sub, kind: node.kind, tone: tone(node), fill: share, critical: run.critical.has(node.call), title: describe(node) };
  });
  const edges = run.edges.map((edge) => ({ from: edge.from, to: edge.to, kind: edge.kind === "spawn" ? "spawn" : edge.source === "inferred" ? "inferred" : "",
    critical: run.critical.get(edge.to) === edge.from }));
  return { nodes, edges };
}

/** Rows: the workers by name, then what no worker had to do, then what still waits. */
function timelineOf(run) {
  const bars = [];
  for (const node of run.nodes) {
    const begun = node.started_at ?? (node.finished_at != null ? node.queued_at : null);
    if (begun == null && node.queued_at == null) continue;
    const reusedHere = node.kind === "hit" || node.kind === "coalesced";
    const row = reusedHere ? "~reuse" : begun == null ? "~queue" : node.worker ?? "~queue";
    bars.push({ id: node.call, row, name: node.node, kind: node.kind, tone: tone(node), wait: node.queued_at, from: begun ?? node.queued_at, first: node.first_token_at,
      to: node.finished_at ?? run.end, critical: run.critical.has(node.call), title: describe(node) });
  }
  const names = { "~reuse": "not computed", "~queue": "queued" };
  const rows = [...new Set(bars.map((bar) => bar.row))].sort().map((id) => ({ id, label: names[id] ?? id }));
  return { rows, bars, start: run.start, end: run.end, live: run.live };
}
