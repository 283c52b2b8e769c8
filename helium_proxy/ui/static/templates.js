// Templates: what the proxy has learnt of each workflow, and what it therefore expects next of a live run.

import { api } from "./api.js";
import { dagView } from "./dag.js";
import { counted, format, h, keyed, set } from "./dom.js";

const LIVE_RUNS = 3;

export function templatesView() {
  const list = h("ul", { class: "list" });
  const title = h("h1");
  const runs = h("span", { class: "muted" });
  const dag = dagView({ label: "Learnt graph", short: true });
  const nodesBody = h("tbody");
  const nextBody = h("tbody");
  const noNext = h("p", { class: "empty", text: "No live run follows this template now." });
  const nextTable = scroll("Predicted next calls", ["Run", "Still to come", "Calls", "Prompt tokens", "Output tokens"], [0, 0, 1, 1, 1], nextBody);
  const detail = h("div", { class: "detail" },
    h("div", { class: "title" }, title, runs),
    h("section", { class: "card", "aria-label": "Learnt graph" }, h("header", {}, h("h2", { text: "Learnt graph" }), h("span", { class: "muted", text: "edge: probability · think time" }), h("span", { class: "grow" }), dag.tools), dag.element),
    h("section", { class: "card", "aria-label": "Predicted next calls" }, h("header", {}, h("h2", { text: "Predicted next calls" })), noNext, nextTable),
    h("section", { class: "card", "aria-label": "Nodes" }, h("header", {}, h("h2", { text: "Nodes" })),
      scroll("Nodes of the template", ["Node", "Calls a run", "Static prefix", "Prompt tokens", "Output tokens", "p90", "Samples"], [0, 1, 1, 1, 1, 1, 1], nodesBody)));
  const nothing = h("div", { class: "card empty", hidden: true, text: "Nothing learnt yet: a template appears after a workflow's first run." });
  const element = h("div", { class: "split" }, h("aside", { class: "side", "aria-label": "Templates" }, h("h2", { text: "Templates" }), list), h("div", {}, nothing, detail));
  let wanted = "";

  async function poll(signal) {
    const templates = (await api.templates(signal)).templates.map(readTemplate);
    const shown = templates.find((template) => template.key === wanted) ?? templates[0];
    keyed(list, templates, (template) => template.key, makeItem, (item, template) => {
      set(item.firstChild, { "aria-current": template === shown ? "true" : null });
      set(item.parts.name, { text: template.name });
      set(item.parts.sub, { text: `${counted(template.runs, "run")} · ${counted(template.nodes.length, "node")}` });
    });
    set(nothing, { hidden: Boolean(shown) });
    set(detail, { hidden: !shown });
    if (shown) draw(shown, await upcoming(shown.workflow, signal));
  }

  function draw(template, next) {
    set(title, { text: template.name });
    set(runs, { text: `learnt from ${counted(template.runs, "run")}` });
    dag.update({
      nodes: template.nodes.map((node) => ({ id: node.id, name: node.id, kind: node.calls < 0.5 ? "expected" : "computed", critical: false, title: node.id,
        fill: node.prompt ? Math.min(1, node.staticTokens / node.prompt) : null,
        sub: `${node.calls > 1.05 ? `× ${node.calls.toFixed(1)} · ` : ""}${format.tokens(node.prompt)} → ${format.tokens(node.output)} tok` })),
      edges: template.edges.map((edge) => ({ ...edge, kind: edge.probability < 0.95 ? "dashed" : "",
        label: [edge.probability < 0.995 ? format.percent(edge.probability) : "", edge.think > 0.02 ? format.seconds(edge.think) : ""].filter(Boolean).join(" · ") })),
    });
    keyed(nodesBody, template.nodes, (node) => node.id, () => row(7), (element, node) => fill(element, [node.id, node.calls.toFixed(1),
      `${format.tokens(node.staticTokens)} tok`, format.tokens(node.prompt), format.tokens(node.output), format.tokens(node.p90), format.int(node.samples)]));
    set(noNext, { hidden: next.length > 0 });
    set(nextTable, { hidden: next.length === 0 });
    keyed(nextBody, next.map((call, index) => ({ ...call, index })), (call) => call.index, () => row(5), (element, call) => {
      fill(element, ["", call.iteration > 1 ? `${call.node}#${call.iteration}` : call.node, format.int(call.calls), format.tokens(call.prompt_tokens), format.tokens(call.output_tokens)]);
      element.cells[0].replaceChildren(h("a", { href: `#/runs/${encodeURIComponent(call.run)}`, class: "mono", text: call.run }));
    });
  }

  return { element, poll, show: (key) => { wanted = key; } };
}

function makeItem(template) {
  const parts = { name: h("strong"), sub: h("small") };
  const link = h("a", { class: "item", href: `#/templates/${encodeURIComponent(template.key)}` }, h("span", { class: "row" }, parts.name), parts.sub);
  return Object.assign(h("li", {}, link), { parts });
}

function scroll(label, heads, right, body) {
  return h("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": label }, h("table", {},
    h("thead", {}, h("tr", {}, heads.map((text, index) => h("th", { text, scope: "col", class: right[index] ? "num" : null })))), body));
}

const row = (count) => h("tr", {}, Array.from({ length: count }, () => h("td")));

function fill(element, values) {
  values.forEach((text, index) => set(element.cells[index], { text, class: index && /^[\d–~]/.test(String(text)) ? "num" : null }));
}

/** What the newest live runs of a workflow should still do, as the proxy predicts it. */
async function upcoming(workflow, signal) {
  const { runs } = await api.runs({ workflow, state: "live", limit: LIVE_RUNS }, signal);
  const full = await Promise.all(runs.map(({ run }) => api.run(run, signal)));
  return full.flatMap(({ run, expected }) => expected.map((call) => ({ ...call, run })));
}

/** One template, its nodes named as the calls of a run are. */
function readTemplate(json) {
  const nodes = json.nodes.map((node) => ({
    id: node.iteration > 1 ? `${node.node}#${node.iteration}` : node.node, calls: node.per_run, staticTokens: node.static_tokens,
    prompt: node.prompt_tokens, output: node.output_tokens?.mean, p90: node.output_tokens?.p90, samples: node.calls }));
  const known = new Set(nodes.map((node) => node.id));
  const edges = json.edges.filter((edge) => known.has(edge.from) && known.has(edge.to))
    .map((edge) => ({ from: edge.from, to: edge.to, probability: edge.probability, think: edge.think_s }));
  return { key: json.template, workflow: json.workflow, name: json.workflow || json.template, runs: json.runs, nodes, edges };
}
