// What the proxy says of a run, turned into what the page draws. Pure functions: no DOM, no clock.

/** Kinds of a call, in the order of the legends; "kv" is the cached part of a computed prompt. */
export const FATES = [
  ["computed", "computed"],
  ["kv", "KV cache"],
  ["coalesced", "coalesced"],
  ["hit", "prompt cache"],
  ["error", "error"],
];
export const KINDS = [...FATES, ["running", "running"], ["queued", "queued"]];
const GLYPHS = { computed: "✓", hit: "↺", coalesced: "=", error: "!", running: "▸", queued: "…", expected: "?" };

export const glyph = (kind) => GLYPHS[kind] ?? "";

/** The kind of one call: its fate once it ended, before that whether a worker has it. */
export function kindOf(node) {
  if (node.state === "error" || node.fate === "error") return "error";
  if (node.finished_at != null) return node.fate ?? "computed";
  if (node.state === "placeholder" || node.state === "expected") return "expected";
  return node.started_at != null || node.state === "running" ? "running" : "queued";
}

/** Prompt tokens by fate over nodes of a run. */
export function promptTokens(nodes) {
  const sum = { computed: 0, kv: 0, coalesced: 0, hit: 0, error: 0 };
  for (const node of nodes) {
    const kind = kindOf(node);
    const prompt = node.prompt_tokens ?? 0;
    if (kind === "computed") {
      const cached = Math.min(node.cached_tokens ?? 0, prompt);
      sum.kv += cached;
      sum.computed += prompt - cached;
    } else if (kind === "hit" || kind === "coalesced") sum[kind] += prompt;
  }
  return sum;
}

export const total = (sum) => Object.values(sum).reduce((a, b) => a + b, 0);
export const reused = (sum) => (total(sum) ? 1 - (sum.computed + sum.error) / total(sum) : NaN);

const times = (node) => [node.queued_at, node.started_at, node.first_token_at, node.finished_at].filter((t) => t != null);

/** Seconds of a call, from its arrival to its end, or to `now` while it has none. */
const spent = (node, now) => (node.finished_at ?? now) - node.queued_at;

/** The longest chain of dependent calls, by time, as helium_run_critical_path_seconds has it: what is spent between
 * calls does not count. As a map from each call on it to the one before it (null: the first). */
export function criticalPath(nodes, edges, now) {
  const chains = new Map(); // call -> the longest chain that ends with it; `missing`: parents not looked at yet
  for (const node of nodes) {
    if (node.queued_at != null) chains.set(node.call, { own: spent(node, now), seconds: spent(node, now), before: null, missing: 0, children: [] });
  }
  for (const { from, to } of edges) {
    if (!chains.has(from) || !chains.has(to)) continue;
    chains.get(from).children.push(to);
    chains.get(to).missing += 1;
  }
  const order = [...chains.keys()].filter((call) => chains.get(call).missing === 0); // grows: parents before children
  let last = null;
  for (const call of order) {
    const { seconds, children } = chains.get(call);
    if (last === null || seconds >= chains.get(last).seconds) last = call;
    for (const child of children) {
      const chain = chains.get(child);
      if (chain.before === null || seconds > chains.get(chain.before).seconds) Object.assign(chain, { before: call, seconds: seconds + chain.own });
      chain.missing -= 1;
      if (chain.missing === 0) order.push(child);
    }
  }
  const path = new Map();
  for (let call = last; call !== null; call = chains.get(call).before) path.set(call, chains.get(call).before);
  return path;
}

/** A run ready to draw. `now` is on the run's own clock; for a live run an open bar ends there. */
export function readRun(json, now = null) {
  const nodes = (json.nodes ?? []).map((node) => ({ ...node, kind: kindOf(node) }));
  const edges = json.edges ?? [];
  const all = nodes.flatMap(times);
  const start = all.length ? Math.min(...all) : 0;
  const latest = all.length ? Math.max(...all) : 0;
  const live = json.state === "live";
  const end = live && now !== null && now > latest ? now : latest;
  const tokens = promptTokens(nodes);
  const sum = (pick) => nodes.reduce((acc, node) => acc + (pick(node) ?? 0), 0);
  return {
    id: json.run, workflow: json.workflow ?? "", state: json.state ?? "done", live, nodes, edges, start, latest, end, tokens,
    expected: json.expected ?? [],
    reused: reused(tokens),
    done: nodes.filter((node) => node.finished_at != null).length,
    errors: nodes.filter((node) => node.kind === "error").length,
    waited: sum((node) => (node.started_at != null && node.queued_at != null ? node.started_at - node.queued_at : 0)),
    outputTokens: sum((node) => node.output_tokens),
    critical: criticalPath(nodes, edges, end),
  };
}

/** Seconds of the calls on the critical path. */
export const criticalSeconds = (run) => run.nodes.reduce((sum, node) => sum + (run.critical.has(node.call) ? spent(node, run.end) : 0), 0);

/** The live clock of a run: the newest time seen, moved on by the local time since it was first seen. */
export function runClock() {
  let newest = -Infinity;
  let at = 0;
  return (json, local) => {
    if (typeof json.now === "number") return json.now;
    const latest = Math.max(...(json.nodes ?? []).flatMap(times), -Infinity);
    if (latest > newest) {
      newest = latest;
      at = local;
    }
    return Number.isFinite(newest) ? newest + (local - at) : null;
  };
}

/** Put bars that overlap in time into lanes: the first lane that is free, in order of start. */
export function lanes(bars) {
  const free = [];
  for (const bar of [...bars].sort((a, b) => a.from - b.from || a.to - b.to)) {
    let lane = free.findIndex((until) => until <= bar.from);
    if (lane < 0) lane = free.push(0) - 1;
    free[lane] = bar.to;
    bar.lane = lane;
  }
  return free.length;
}
