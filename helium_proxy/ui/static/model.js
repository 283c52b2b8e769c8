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

/** The longest chain of dependent calls, by time: from the last call to end, back through its latest parent. As a map
 * from each call on it to the one it waited for (null: the first). */
export function criticalPath(nodes, edges) {
  const by = new Map(nodes.map((node) => [node.call, node]));
  const parents = new Map();
  for (const { from, to } of edges) {
    if (by.has(from) && by.has(to)) parents.set(to, [...(parents.get(to) ?? []), from]);
  }
  const end = (call) => Math.max(...times(by.get(call)), -Infinity);
  const latest = (calls) => calls.reduce((best, call) => (best === null || end(call) > end(best) ? call : best), null);
  const path = new Map();
  for (let call = latest([...by.keys()]); call !== null && !path.has(call); call = path.get(call)) {
    path.set(call, latest(parents.get(call) ?? []));
  }
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
    critical: criticalPath(nodes, edges),
  };
}

/** Busy seconds along the critical path: time on workers, waits left out. */
export function criticalSeconds(run) {
  let seconds = 0;
  for (const node of run.nodes) {
    if (run.critical.has(node.call) && node.started_at != null) seconds += (node.finished_at ?? run.end) - node.started_at;
  }
  return seconds;
}

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
