// Plans: what would be done with a submitted workflow, or what was.

import { api } from "./api.js";
import { dagView } from "./dag.js";
import { format, h, keyed, pill, set, tile } from "./dom.js";
import { ganttView } from "./gantt.js";

const EXAMPLE = {
  workflow: "map-reduce", model: "demo",
  nodes: [
    ...["law", "cost"].map((field) => ({ id: `expert_${field}`, params: { max_tokens: 64, temperature: 0 },
      messages: [{ role: "system", content: `You are an expert in ${field}.` }, { role: "user", content: "{{inputs.question}}" }] })),
    { id: "summary", params: { max_tokens: 64, temperature: 0 }, messages: [{ role: "user", content: "{{inputs.question}}\n{{nodes.expert_law}}\n{{nodes.expert_cost}}" }] },
  ],
  outputs: ["summary"], inputs: [{ question: "May a city ban cars?" }, { question: "Should trams be free?" }],
};

export function plansView() {
  const editor = h("textarea", { class: "editor", spellcheck: "false", "aria-label": "Workflow as JSON" });
  editor.value = JSON.stringify(EXAMPLE, null, 1);
  const lookup = h("input", { "aria-label": "Id of a submitted workflow", placeholder: "id of a submitted workflow" });
  const problem = h("p", { class: "notice", hidden: true, role: "alert" });
  const tiles = { state: tile("State"), calls: tile("Calls"), removed: tile("Removed by rewrites", "good"), tokens: tile("Predicted computed tokens"), span: tile("Predicted makespan") };
  const dag = dagView({ label: "Plan", short: true });
  const gantt = ganttView({ label: "Planned order and placement" });
  const rewrites = h("ul", { class: "list" });
  const tree = h("ul", { class: "tree" });
  const raw = h("pre", { class: "mono scroll body", tabindex: 0 });
  const result = h("div", { class: "detail", hidden: true },
    h("dl", { class: "tiles" }, Object.values(tiles)),
    h("section", { class: "card", "aria-label": "Operators" }, h("header", {}, h("h2", { text: "Operators" }), h("span", { class: "grow" }), dag.tools), dag.element),
    h("section", { class: "card", "aria-label": "Order and placement" }, h("header", {}, h("h2", { text: "Order and placement" })), gantt.element),
    h("section", { class: "card", "aria-label": "Rewrites" }, h("header", {}, h("h2", { text: "Rewrites" })), h("div", { class: "body" }, rewrites)),
    h("section", { class: "card", "aria-label": "Prefix tree" }, h("header", {}, h("h2", { text: "Prefix tree" })), h("div", { class: "body" }, tree)),
    h("details", { class: "card" }, h("summary", { class: "body", text: "The answer as JSON" }), raw));
  const form = h("section", { class: "card", "aria-label": "Workflow" },
    h("header", {}, h("h2", { text: "Explain a workflow" }), h("span", { class: "muted", text: "planned, not run" })),
    h("div", { class: "body detail" }, editor, problem,
      h("p", { class: "actions" }, lookup, h("button", { type: "button", text: "Open", onclick: () => { location.hash = `#/plans/${encodeURIComponent(lookup.value.trim())}`; } }), h("span", { class: "grow" }),
        h("button", { type: "button", class: "primary", text: "Explain", onclick: explain }))));
  const element = h("div", { class: "page" }, h("h1", { text: "Plans" }), h("div", { class: "two" }, form, result));
  let wanted = "";

  async function explain() {
    try {
      JSON.parse(editor.value);
      draw(await api.explain(editor.value));
      set(problem, { hidden: true });
    } catch (error) {
      set(problem, { hidden: false, text: error.message });
    }
  }

  async function poll(signal) {
    if (!wanted) return;
    try {
      draw(await api.plan(wanted, signal));
      set(problem, { hidden: true });
    } catch (error) {
      set(problem, { hidden: false, text: `${wanted}: ${error.message}` });
      throw error;
    }
  }

  function draw(json) {
    const plan = readPlan(json);
    set(result, { hidden: false });
    set(tiles.state.value, { text: plan.state });
    set(tiles.calls.value, { text: format.int(plan.calls) });
    set(tiles.removed.value, { text: format.int(plan.removed) });
    set(tiles.tokens.value, { text: format.tokens(plan.tokens) });
    set(tiles.span.value, { text: format.seconds(plan.makespan) });
    dag.update(plan.graph);
    gantt.update(plan.timeline);
    keyed(rewrites, plan.rewrites.length ? plan.rewrites : [{ rule: "none", text: "Nothing to prune, merge or substitute." }], (_, index) => index,
      () => h("li", {}, h("span"), " ", h("span")), (item, rewrite) => {
        set(item.firstChild, { class: "pill computed", text: rewrite.rule });
        set(item.lastChild, { text: rewrite.text });
      });
    tree.replaceChildren(...plan.tree.map(branch));
    set(raw, { text: JSON.stringify(json, null, 1) });
  }

  return { element, poll, show: (id) => { wanted = id; lookup.value = id; } };
}

function branch(node) {
  return h("li", {}, h("span", {}, h("code", { text: node.label }), h("small", { class: "muted", text: node.detail }), node.shared ? pill(`shared by ${node.shared}`, "kv") : null),
    node.children.length ? h("ul", { class: "tree" }, node.children.map(branch)) : null);
}

function readTree(node) {
  const children = (node.children ?? []).map(readTree);
  const text = node.segment ?? node.text ?? node.name ?? node.op ?? "";
  return { label: String(text).slice(0, 90) || "(root)", detail: node.tokens == null ? "" : `${format.int(node.tokens)} tokens`, shared: node.shared ?? (children.length > 1 ? children.length : 0), children };
}

/** A plan, explained or running, as the view draws it. */
function readPlan(json) {
  const plan = json.plan ?? json;
  const operators = plan.operators ?? plan.nodes ?? plan.calls ?? [];
  const idOf = (operator) => operator.id ?? operator.call ?? operator.node;
  const edges = plan.edges ?? operators.flatMap((operator) => (operator.parents ?? []).map((from) => ({ from, to: idOf(operator) })));
  const schedule = plan.schedule ?? plan.placement ?? [];
  const bars = schedule.map((step, index) => ({ id: `${idOf(step)}-${index}`, row: String(step.worker ?? "worker"), name: String(idOf(step)), kind: "computed",
    wait: null, from: step.start_s ?? step.start ?? index, first: step.first_token_s ?? null, to: step.end_s ?? step.end ?? index + 1, critical: Boolean(step.critical), title: `${idOf(step)} on ${step.worker}` }));
  const predicted = plan.predicted ?? plan;
  const rewrites = (plan.rewrites ?? []).map((rewrite) => (typeof rewrite === "string" ? { rule: "rewrite", text: rewrite } : { rule: rewrite.rule, text: rewrite.text ?? rewrite.detail ?? (rewrite.operators ?? rewrite.removed ?? []).toString(), count: rewrite.count }));
  const root = plan.tree ?? plan.prefix_tree;
  return {
    state: json.state ?? json.status ?? "explained", calls: plan.calls_total ?? operators.length,
    removed: plan.removed ?? rewrites.reduce((acc, rewrite) => acc + (rewrite.count ?? 0), 0),
    tokens: predicted.computed_tokens, makespan: predicted.makespan_s ?? predicted.makespan,
    graph: { nodes: operators.map((operator) => ({ id: idOf(operator), name: String(operator.node ?? idOf(operator)), sub: operator.worker ?? operator.state ?? "", kind: operator.kind === "CacheFetch" ? "hit" : "computed", fill: null, title: String(idOf(operator)) })), edges },
    timeline: { rows: [...new Set(bars.map((bar) => bar.row))].sort().map((id) => ({ id, label: id })), bars, start: 0, end: Math.max(0.001, ...bars.map((bar) => bar.to)), live: false },
    rewrites, tree: root ? (Array.isArray(root) ? root : [root]).map(readTree) : [],
  };
}
