// Plans: what would be done with a workflow, and what was done with those submitted, beside the prediction.

import { api, Unauthorized } from "./api.js";
import { dagView } from "./dag.js";
import { counted, format, h, keyed, legend, pill, set, tile } from "./dom.js";
import { ganttView } from "./gantt.js";
import { FATES } from "./model.js";

const field = (name) => ({ id: `expert_${name}`, params: { max_tokens: 64, temperature: 0 },
  messages: [{ role: "system", content: `You are an expert in ${name}.` }, { role: "user", content: "{{inputs.question}}" }] });
const EXAMPLE = {
  workflow: "map-reduce", model: "demo",
  nodes: [field("law"), field("cost"), { id: "unused", messages: [{ role: "user", content: "{{nodes.expert_law}}" }] },
    { id: "summary", params: { max_tokens: 64, temperature: 0 }, messages: [{ role: "user", content: "{{inputs.question}}\n{{nodes.expert_law}}\n{{nodes.expert_cost}}" }] }],
  outputs: ["summary"], inputs: [{ question: "May a city ban cars?" }, { question: "Should trams be free?" }],
};

export function plansView() {
  const editor = h("textarea", { class: "editor", spellcheck: "false", "aria-label": "Workflow as JSON" });
  editor.value = JSON.stringify(EXAMPLE, null, 1);
  const problem = h("p", { class: "notice", hidden: true, role: "alert" });
  const jobs = h("ul", { class: "list" });
  const noJobs = h("p", { class: "muted", text: "None. POST /v1/workflows submits one." });
  const result = planPane();
  const form = h("section", { class: "card", "aria-label": "Explain a workflow" },
    h("header", {}, h("h2", { text: "Explain a workflow" }), h("span", { class: "muted", text: "planned, not run" }), h("span", { class: "grow" }),
      h("button", { type: "button", class: "primary", text: "Explain", onclick: explain })),
    h("div", { class: "body detail" }, editor, problem));
  const submitted = h("section", { class: "card", "aria-label": "Submitted workflows" }, h("header", {}, h("h2", { text: "Submitted workflows" })), h("div", { class: "body" }, noJobs, jobs));
  const element = h("div", { class: "page" }, h("h1", { text: "Plans" }), h("div", { class: "two" }, h("div", { class: "detail" }, form, submitted), result.element));
  let wanted = ""; // id of the submitted workflow to show; empty: what was explained last

  const complain = (text) => set(problem, { hidden: !text, text: text ?? "" });

  async function explain() {
    try {
      JSON.parse(editor.value);
      result.draw(await api.explain(editor.value));
      if (wanted) location.hash = "#/plans";
      complain(null);
    } catch (error) {
      complain(error.message);
    }
  }

  async function poll(signal) {
    const { data } = await api.plans(signal);
    set(noJobs, { hidden: data.length > 0 });
    keyed(jobs, data.slice(0, 20), (job) => job.id, makeJob, (item, job) => updateJob(item, job, wanted));
    if (!wanted) return;
    try {
      result.draw(await api.plan(wanted, signal));
    } catch (error) {
      if (error instanceof Unauthorized || error instanceof TypeError || signal.aborted) throw error;
      complain(error.message);
    }
  }

  return { element, poll, show: (id) => { wanted = id; } };
}

function makeJob(job) {
  const parts = { name: h("strong"), state: h("span"), id: h("small", { class: "mono" }), calls: h("small") };
  const link = h("a", { class: "item", href: `#/plans/${encodeURIComponent(job.id)}` }, h("span", { class: "row" }, parts.name, parts.state), h("span", { class: "row" }, parts.id, parts.calls));
  return Object.assign(h("li", {}, link), { link, parts });
}

const JOB_PILLS = { running: "live", completed: "ok", partial: "running", failed: "bad", cancelled: "bad" };

function updateJob({ parts, link }, job, wanted) {
  set(link, { "aria-current": job.id === wanted ? "true" : null });
  set(parts.name, { text: job.workflow });
  set(parts.state, { class: `pill ${JOB_PILLS[job.status] ?? ""}`, text: job.status });
  set(parts.id, { text: job.id });
  set(parts.calls, { text: `${format.int(job.operators.planned)} of ${counted(job.operators.submitted, "operator")} · ${counted(job.inputs.total, "input")}` });
}

function planPane() {
  const tiles = { operators: tile("Operators to compute"), dropped: tile("Removed by rewrites", "good"), tokens: tile("Prompt tokens to compute"), span: tile("Predicted makespan"), actual: tile("Actual") };
  const dag = dagView({ label: "Operators", short: true });
  const gantt = ganttView({ label: "Order and placement" });
  const rewrites = h("ul", { class: "list" });
  const tree = h("ul", { class: "tree" });
  const raw = h("pre", { class: "mono scroll body", tabindex: 0 });
  const warnings = h("p", { class: "notice", role: "status" });
  const element = h("div", { class: "detail", hidden: true }, warnings,
    h("dl", { class: "tiles" }, Object.values(tiles)),
    h("section", { class: "card", "aria-label": "Operators" }, h("header", {}, h("h2", { text: "Operators" }), legend([...FATES, ["queued", "planned"]]), h("span", { class: "grow" }), dag.tools), dag.element),
    h("section", { class: "card", "aria-label": "Order and placement" }, h("header", {}, h("h2", { text: "Order and placement" }), h("span", { class: "muted", text: "as it was once run, else as predicted" })), gantt.element),
    h("section", { class: "card", "aria-label": "Rewrites" }, h("header", {}, h("h2", { text: "Rewrites" })), h("div", { class: "body" }, rewrites)),
    h("section", { class: "card", "aria-label": "Prefix tree" }, h("header", {}, h("h2", { text: "Prefix tree" }), h("span", { class: "muted", text: "tokens · operators below" })), h("div", { class: "body scroll", tabindex: 0 }, tree)),
    h("details", { class: "card" }, h("summary", { class: "body", text: "The answer as JSON" }), raw));

  function draw(plan) {
    set(element, { hidden: false });
    set(warnings, { hidden: !plan.warnings.length, text: `Warning: ${plan.warnings.join("; ")}` });
    const { predicted, actual } = plan;
    const dropped = plan.rewrites.reduce((sum, rewrite) => sum + rewrite.dropped + rewrite.fetched, 0);
    tiles.operators.value.replaceChildren(format.int(plan.operators_planned), h("small", { text: ` of ${format.int(plan.operators_submitted)}` }));
    set(tiles.dropped.value, { text: format.int(dropped) });
    tiles.tokens.value.replaceChildren(format.tokens(predicted.computed_tokens), h("small", { text: ` of ${format.tokens(predicted.prompt_tokens)}` }));
    set(tiles.span.value, { text: format.seconds(predicted.makespan_s) });
    tiles.actual.value.replaceChildren(actual ? format.seconds(actual.makespan_s) : "not run", h("small", { text: actual ? ` · ${format.tokens(actual.computed_tokens)} tok` : "" }));
    dag.update(graphOf(plan));
    gantt.update(timelineOf(plan));
    const done = plan.rewrites.filter((rewrite) => rewrite.dropped || rewrite.fetched);
    keyed(rewrites, done.length ? done : [null], (rewrite) => rewrite?.rule ?? "", () => h("li", {}, h("span"), " ", h("span")), (item, rewrite) => {
      set(item.firstChild, { class: "pill computed", text: rewrite?.rule ?? "none" });
      set(item.lastChild, { text: rewrite ? describe(rewrite) : "Nothing to prune, merge or fetch." });
    });
    tree.replaceChildren(...plan.prefix_tree.map(branch));
    set(raw, { text: JSON.stringify(plan, null, 1) });
  }

  return { element, draw };
}

function describe(rewrite) {
  const nodes = Object.entries(rewrite.nodes).map(([node, count]) => `${node} × ${count}`).join(", ");
  const done = [rewrite.dropped ? `${rewrite.dropped} dropped` : "", rewrite.fetched ? `${rewrite.fetched} fetched from the prompt cache` : ""].filter(Boolean).join(", ");
  return nodes ? `${done} (${nodes})` : done;
}

const kindOf = (operator) => operator.actual?.status === "failed" ? "error" : operator.actual?.fate ?? (operator.cache_fetch ? "hit" : operator.actual?.started_s != null && operator.actual.finished_s == null ? "running" : "queued");

function graphOf(plan) {
  const nodes = plan.operators.map((operator) => ({ id: operator.operator, name: operator.operator, kind: kindOf(operator), fill: operator.prompt_tokens ? 1 - operator.predicted_computed_tokens / operator.prompt_tokens : null,
    sub: operator.worker ? `${format.tokens(operator.prompt_tokens)} tok · ${operator.worker}` : "from the cache", title: `${operator.operator}: ${operator.worker ?? "prompt cache"}` }));
  return { nodes, edges: plan.operators.flatMap((operator) => operator.depends_on.map((from) => ({ from, to: operator.operator }))) };
}

function timelineOf(plan) {
  const ran = Boolean(plan.actual);
  const bars = [];
  for (const operator of plan.operators) {
    const from = ran ? operator.actual?.started_s : operator.predicted_started_s;
    if (from == null) continue;
    const to = (ran ? operator.actual.finished_s : operator.predicted_finished_s) ?? from;
    bars.push({ id: operator.operator, row: (ran && operator.actual.worker) || operator.worker || "prompt cache", name: operator.operator, kind: kindOf(operator), wait: null, from, first: null, to,
      critical: false, title: `${operator.operator}: ${format.seconds(to - from)}` });
  }
  return { rows: [...new Set(bars.map((bar) => bar.row))].sort().map((id) => ({ id, label: id })), bars, start: 0, end: Math.max(0.001, ...bars.map((bar) => bar.to)), live: false };
}

function branch(node) {
  const label = node.operator ? `→ ${node.operator}` : node.model ? `model ${node.model}` : node.segment;
  return h("li", {}, h("span", {}, h("code", { text: label }), h("small", { class: "muted", text: `${format.int(node.tokens)} tok` }), node.operators_below > 1 ? pill(`× ${node.operators_below}`, "kv") : null),
    node.children ? h("ul", { class: "tree" }, node.children.map(branch)) : null);
}
