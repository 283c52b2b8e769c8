// Templates: what the proxy has learnt of each workflow, and what it therefore expects next of a live run.

import { api } from "./api.js";
import { dagView } from "./dag.js";
import { format, h, keyed, pill, set } from "./dom.js";

export function templatesView() {
  const list = h("ul", { class: "list" });
  const title = h("h1");
  const runs = h("span", { class: "muted" });
  const dag = dagView({ label: "Learnt graph", short: true });
  const nodesBody = h("tbody");
  const nextBody = h("tbody");
  const noNext = h("p", { class: "empty", text: "No live run follows this template now." });
  const nextTable = scroll("Predicted next calls", ["Run", "Next call", "Probability", "Prompt tokens", "Output tokens", "Expected in"], [0, 0, 1, 1, 1, 1], nextBody);
  const detail = h("div", { class: "detail" },
    h("div", { class: "title" }, title, runs),
    h("section", { class: "card", "aria-label": "Learnt graph" }, h("header", {}, h("h2", { text: "Learnt graph" }), h("span", { class: "muted", text: "edge: probability · think time" }), h("span", { class: "grow" }), dag.tools), dag.element),
    h("section", { class: "card", "aria-label": "Predicted next calls" }, h("header", {}, h("h2", { text: "Predicted next calls" })), noNext, nextTable),
    h("section", { class: "card", "aria-label": "Nodes" }, h("header", {}, h("h2", { text: "Nodes" })),
      scroll("Nodes of the template", ["Node", "Calls a run", "Probability", "Static prefix", "Prompt tokens", "Output tokens", "p90", "Samples"], [0, 1, 1, 1, 1, 1, 1, 1], nodesBody)));
  const nothing = h("div", { class: "card empty", hidden: true, text: "Nothing learnt yet: a template appears after a workflow's first run." });
  const element = h("div", { class: "split" }, h("aside", { class: "side", "aria-label": "Templates" }, h("h2", { text: "Templates" }), list), h("div", {}, nothing, detail));
  let wanted = "";

  async function poll(signal) {
    const templates = (await api.templates(signal)).templates.map(readTemplate);
    const shown = templates.find((template) => template.key === wanted) ?? templates[0];
    keyed(list, templates, (template) => template.key, makeItem, (item, template) => {
      set(item.firstChild, { "aria-current": template === shown ? "true" : null });
      set(item.parts.name, { text: template.name });
      set(item.parts.sub, { text: `${format.int(template.runs)} runs · ${template.nodes.length} nodes` });
    });
    set(nothing, { hidden: Boolean(shown) });
    set(detail, { hidden: !shown });
    if (shown) draw(shown);
  }

  function draw(template) {
    set(title, { text: template.name });
    set(runs, { text: `learnt from ${format.int(template.runs)} runs` });
    dag.update({
      nodes: template.nodes.map((node) => ({ id: node.id, name: node.id, kind: node.probability < 0.5 ? "expected" : "computed", critical: false, title: node.id,
        fill: node.prompt ? Math.min(1, (node.staticTokens ?? 0) / node.prompt) : null,
        sub: `${node.calls > 1.05 ? `× ${node.calls.toFixed(1)} · ` : ""}${format.tokens(node.prompt)} → ${format.tokens(node.output)} tok` })),
      edges: template.edges.map((edge) => ({ ...edge, kind: edge.probability < 0.95 ? "dashed" : "",
        label: [edge.probability < 0.995 ? format.percent(edge.probability) : "", edge.think > 0.0005 ? format.seconds(edge.think) : ""].filter(Boolean).join(" · ") })),
    });
    keyed(nodesBody, template.nodes, (node) => node.id, () => row(8), (element, node) => fill(element, [node.id, node.calls?.toFixed(1) ?? "–", format.percent(node.probability),
      node.staticTokens == null ? `${format.int(node.staticMessages)} messages` : `${format.tokens(node.staticTokens)} tok`, format.tokens(node.prompt), format.tokens(node.output), format.tokens(node.p90), format.int(node.samples)]));
    set(noNext, { hidden: template.next.length > 0 });
    set(nextTable, { hidden: template.next.length === 0 });
    keyed(nextBody, template.next.map((call, index) => ({ ...call, index })), (call) => call.index, () => row(6), (element, call) => {
      fill(element, ["", call.node, format.percent(call.probability), format.tokens(call.prompt_tokens), format.tokens(call.output_tokens), format.seconds(call.in_s)]);
      element.cells[0].replaceChildren(h("a", { href: `#/runs/${encodeURIComponent(call.run)}`, class: "mono", text: call.run }));
    });
  }

  return { element, poll, show: (key) => { wanted = key; } };
}

function makeItem(template) {
  const parts = { name: h("strong"), sub: h("small") };
  const link = h("a", { class: "item", href: `#/templates/${encodeURIComponent(template.key)}` }, h("span", { class: "row" }, parts.name, template.learnt ? pill("inferred", "coalesced") : null), parts.sub);
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

/** One template; names that may be absent are given neutral values. */
function readTemplate(json) {
  const edges = (json.edges ?? []).map((edge) => ({ from: edge.from, to: edge.to, probability: edge.probability ?? 1, think: edge.think_s ?? 0 }));
  const nodes = (json.nodes ?? []).map((node) => ({
    id: node.node ?? node.id, calls: node.calls_per_run ?? 1, probability: node.probability ?? 1, staticMessages: node.static_messages,
    staticTokens: node.static_tokens, prompt: node.prompt_tokens, output: node.output_tokens, p90: node.output_tokens_p90, samples: node.samples }));
  const key = json.template ?? json.key ?? json.workflow;
  return { key, name: json.workflow || key, learnt: Boolean(json.inferred), runs: json.runs ?? 0, nodes, edges, next: json.next ?? json.expected ?? [] };
}
