"""The three dashboards as code: ``python docker/grafana/build.py`` writes ``docker/grafana/dashboards/*.json``.

vLLM's own series stand beside ours where both know the answer: a proxy that believes in cache hits which the engine
does not see is found at a glance. A worker's id is its host and port, which is also the ``instance`` of its scrape.
"""

from __future__ import annotations

import json
from pathlib import Path

from panels import Column, Dashboard, bars, heat, lines, stat, table, text, variable, waterfall

OUT = Path(__file__).parent / "dashboards"
W = 'workflow=~"$workflow"'
COMPUTED = W + ',fate="computed"'
SAVED = W + ',fate!="computed"'
K = 'worker=~"$worker"'
I = 'instance=~"$worker"'  # noqa: E741
RATE = "$__rate_interval"

WORKFLOW = variable("workflow", "Workflow", "label_values(helium_calls_total, workflow)")
WORKER = variable("worker", "Worker", "label_values(helium_worker_up, worker)")


def grown(metric: str, labels: str = "", by: str = "") -> str:
    """What a counter grew by over the chosen range."""
    return f"sum {f'by ({by}) ' if by else ''}(increase({metric}{{{labels}}}[$__range]))"


def rate(metric: str, labels: str = "", by: str = "") -> str:
    return f"sum {f'by ({by}) ' if by else ''}(rate({metric}{{{labels}}}[{RATE}]))"


def quantile(q: float, metric: str, labels: str = "", by: str = "") -> str:
    return f"histogram_quantile({q}, {rate(metric + '_bucket', labels, ', '.join(filter(None, ('le', by))))})"


def mean(metric: str, labels: str = "", by: str = "") -> str:
    return f"{rate(metric + '_sum', labels, by)} / {rate(metric + '_count', labels, by)}"


SAVINGS = Dashboard(
    "helium-savings",
    "Helium · Savings",
    "What was not computed, why not, and what that was worth.",
    (
        (
            "In the chosen range",
            (
                stat("Prompt tokens not computed", "Share of all prompt tokens that no engine had to prefill.",
                     f'1 - {grown("helium_prompt_tokens_total", COMPUTED)} / {grown("helium_prompt_tokens_total", W)}',
                     "percentunit", good=True),
                stat("Prompt tokens saved", "KV hits, coalesced calls and prompt cache hits.",
                     grown("helium_prompt_tokens_total", SAVED), good=True),
                stat("Engine seconds saved", "At the prefill and decode rates measured on the workers: GPU seconds on GPUs.",
                     grown("helium_saved_engine_seconds_total", W), "s", good=True),
                stat("Calls no engine saw", "Share answered from the prompt cache or joined to an equal call in flight.",
                     f'sum(increase(helium_calls_total{{{W},fate=~"hit|coalesced"}}[$__range])) / {grown("helium_calls_total", W)} or vector(0)',
                     "percentunit", good=True),
                stat("Calls", "All LLM calls.", grown("helium_calls_total", W)),
                stat("Output tokens", "Tokens answered, computed or not.", grown("helium_output_tokens_total", W)),
            ),
        ),
        (
            "Prompt tokens",
            (
                lines("Prompt tokens by fate", "computed: prefilled; kv_hit: found in a worker's prefix cache; coalesced and prompt_cache: never sent.",
                      (rate("helium_prompt_tokens_total", W, "fate"), "{{fate}}"), stacked=True),
                lines("Share not computed, by workflow", "1 − computed ÷ all.",
                      ("1 - " + rate("helium_prompt_tokens_total", COMPUTED, "workflow") + " / "
                       + rate("helium_prompt_tokens_total", W, "workflow"), "{{workflow}}"), unit="percentunit", top=1),
                lines("KV hit rate: ours and vLLM's", "Ours over calls that reached an engine; vLLM's over everything it was asked, by worker. They should agree.",
                      (rate("helium_prompt_tokens_total", 'fate="kv_hit"') + " / " + rate("helium_prompt_tokens_total", 'fate=~"kv_hit|computed"'), "proxy"),
                      (f'{rate("vllm:prefix_cache_hits_total", "", "instance")} / {rate("vllm:prefix_cache_queries_total", "", "instance")}', "vLLM {{instance}}"),
                      unit="percentunit", top=1),
                lines("vLLM: prompt tokens by source", "What the engines say they did with their prompt tokens.",
                      (rate("vllm:prompt_tokens_by_source_total", "", "source"), "{{source}}"), stacked=True),
            ),
        ),
        (
            "Worth",
            (
                lines("Engines saved", "Engine seconds saved per second: 1 is one engine's whole time.",
                      (rate("helium_saved_engine_seconds_total", W, "by"), "{{by}}"), stacked=True),
                lines("Calls by fate", "", (rate("helium_calls_total", W, "fate"), "{{fate}}"), unit="reqps", stacked=True),
                table("By workflow", "Over the chosen range.", ("workflow",),
                      Column("Calls", grown("helium_calls_total", W, "workflow")),
                      Column("Prompt tokens", grown("helium_prompt_tokens_total", W, "workflow")),
                      Column("Computed", grown("helium_prompt_tokens_total", COMPUTED, "workflow")),
                      Column("Not computed", "1 - " + grown("helium_prompt_tokens_total", COMPUTED, "workflow") + " / "
                             + grown("helium_prompt_tokens_total", W, "workflow"), "percentunit"),
                      Column("Engine seconds saved", grown("helium_saved_engine_seconds_total", W, "workflow"), "s")),
                bars("Hit rate by node", "Share of prompt tokens not computed; the lowest are where tagging or pinning would pay.",
                     ("bottomk(15, 1 - " + grown("helium_prompt_tokens_total", COMPUTED, "workflow, node") + " / "
                      + grown("helium_prompt_tokens_total", W, "workflow, node") + ")", "{{workflow}}/{{node}}"), unit="percentunit"),
                bars("Most computed tokens by node", "Where the prefill goes.",
                     ("topk(15, " + grown("helium_prompt_tokens_total", COMPUTED, "workflow, node") + ")", "{{workflow}}/{{node}}")),
            ),
        ),
        (
            "Prompt cache",
            (
                lines("Look-ups", "", (rate("helium_prompt_cache_requests_total", "", "result"), "{{result}}"), unit="reqps", width=8, stacked=True),
                lines("Held", "", ("sum(helium_prompt_cache_bytes)", "bytes"), unit="bytes", width=8),
                lines("Entries and evictions", "", ("sum(helium_prompt_cache_entries)", "entries"),
                      (rate("helium_prompt_cache_evictions_total"), "evictions/s"), width=8),
            ),
        ),
        (
            "Is the prediction true?",
            (
                lines("Cached tokens: predicted, reported, vLLM's", "Predicted at placement; reported in the answers; counted by vLLM itself.",
                      (rate("helium_predicted_cached_tokens_total"), "predicted"), (rate("helium_actual_cached_tokens_total"), "reported"),
                      (rate("vllm:prompt_tokens_cached_total"), "vLLM")),
                lines("Error of one call", "Tokens between predicted and reported.",
                      (quantile(0.5, "helium_cached_prediction_error_tokens"), "p50"), (quantile(0.95, "helium_cached_prediction_error_tokens"), "p95")),
            ),
        ),
    ),
    (WORKFLOW,),
)  # fmt: skip


def per_call(phase: str) -> str:
    """Mean seconds of a phase per call of a node."""
    spent = grown("helium_node_seconds_total", f'{W},phase="{phase}"', "node")
    return f"{spent} / {grown('helium_node_calls_total', W, 'node')}"


WORKFLOWS = Dashboard(
    "helium-workflows",
    "Helium · Workflows",
    "How long runs take, where the time goes, and how well they were foreseen.",
    (
        (
            "Runs",
            (
                stat("Live runs", "", "sum(helium_runs_live)"),
                stat("Runs ended", "", grown("helium_runs_total", W)),
                stat("Makespan, median", "First arrival to last answer.", f"histogram_quantile(0.5, {grown('helium_run_makespan_seconds_bucket', W, 'le')})", "s"),
                stat("Critical path, median", "Longest chain of dependent calls.", f"histogram_quantile(0.5, {grown('helium_run_critical_path_seconds_bucket', W, 'le')})", "s"),
                stat("Makespan ÷ critical path", "1: nothing but the chain itself took time.",
                     f"{grown('helium_run_makespan_seconds_sum', W)} / {grown('helium_run_critical_path_seconds_sum', W)}"),
                stat("Calls a run", "", f"{grown('helium_calls_total', W)} / {grown('helium_runs_total', W)}"),
            ),
        ),
        (
            "Time",
            (
                lines("Makespan", "", (quantile(0.5, "helium_run_makespan_seconds", W, "workflow"), "{{workflow}} p50"),
                      (quantile(0.95, "helium_run_makespan_seconds", W, "workflow"), "{{workflow}} p95"), unit="s"),
                lines("Critical path, mean, and runs ended", "", (mean("helium_run_critical_path_seconds", W, "workflow"), "{{workflow}}"), unit="s"),
                waterfall("A typical run, node by node", "Means over the range: when a node's calls arrive after their run began, wait, prefill and decode. One run in full: the proxy's own page.",
                          {"before": (per_call("before"), "node"), "queue": (per_call("queue"), "node"),
                           "first token": (per_call("first_token"), "node"), "decode": (per_call("decode"), "node")}, hidden="before"),
                text("Every single run, live, as a graph and a timeline: the proxy's page at [`/helium/`](/helium/) on its own port. "
                     "With tracing on, the same waterfall is a trace (`helium.run` is the attribute to search for).", height=2),
            ),
        ),
        (
            "Nodes",
            (
                table("By node", "Over the chosen range.", ("workflow", "node"),
                      Column("Calls", grown("helium_calls_total", W, "workflow, node")),
                      Column("Seconds waiting", grown("helium_node_seconds_total", W + ',phase="queue"', "workflow, node"), "s"),
                      Column("To first token", grown("helium_node_seconds_total", W + ',phase="first_token"', "workflow, node"), "s"),
                      Column("Decoding", grown("helium_node_seconds_total", W + ',phase="decode"', "workflow, node"), "s"),
                      Column("Prompt tokens", grown("helium_prompt_tokens_total", W, "workflow, node")),
                      Column("Output tokens", grown("helium_output_tokens_total", W, "workflow, node")), height=11),
                heat("Queue time", "From being ready to being sent to a worker.", rate("helium_queue_seconds_bucket", "", "le")),
                heat("Time to first byte", "From arrival, as the client sees it.", rate("helium_first_byte_seconds_bucket", "", "le")),
            ),
        ),
        (
            "Seeing the workflow",
            (
                lines("Edges by source", "tag: said; native: an agent's own headers; inferred: from content.", (rate("helium_edges_total", "", "source"), "{{source}}"), width=12),
                lines("Tags refused or contradicting", "", (rate("helium_tags_ignored_total"), "ignored"), (rate("helium_tag_conflicts_total"), "conflicts"), width=12),
            ),
        ),
        (
            "Foresight",
            (
                lines("Output length: predicted ÷ actual", "1 is right.", (quantile(0.1, "helium_output_prediction_ratio"), "p10"),
                      (quantile(0.5, "helium_output_prediction_ratio"), "p50"), (quantile(0.9, "helium_output_prediction_ratio"), "p90"), width=8),
                lines("Duration: predicted ÷ actual", "1 is right.", (quantile(0.1, "helium_finish_prediction_ratio"), "p10"),
                      (quantile(0.5, "helium_finish_prediction_ratio"), "p50"), (quantile(0.9, "helium_finish_prediction_ratio"), "p90"), width=8),
                lines("Lookahead", "Prefixes prefilled ahead of need: used or wasted.", (rate("helium_lookahead_total", "", "result"), "{{result}}"), width=8),
            ),
        ),
    ),
    (WORKFLOW,),
)  # fmt: skip

WORKERS = Dashboard(
    "helium-workers",
    "Helium · Workers",
    "Load, KV memory and pins of the workers, and the proxy's own health.",
    (
        (
            "State",
            (
                stat("Workers up", "", "count(max by (worker) (helium_worker_up) == 1) or vector(0)", good=True),
                stat("Calls waiting in the proxy", "", "sum(helium_queue_calls)"),
                stat("Running on the engines", "vLLM's count.", "sum(vllm:num_requests_running)"),
                stat("Waiting in the engines", "Kept short: the order stays the proxy's.", "sum(vllm:num_requests_waiting)"),
                stat("Busiest ÷ mean worker", "By tokens processed over the range.",
                     "max(sum by (instance) (increase(vllm:iteration_tokens_total_sum[$__range]))) / avg(sum by (instance) (increase(vllm:iteration_tokens_total_sum[$__range])))"),
                stat("Preemptions", "Calls thrown out of KV memory and begun again.", "sum(increase(vllm:num_preemptions_total[$__range]))"),
            ),
        ),
        (
            "Load",
            (
                lines("Running calls", "Ours: calls of this proxy. vLLM's: everybody's.", (f"helium_worker_running_calls{{{K}}}", "ours {{worker}}"),
                      (f"vllm:num_requests_running{{{I}}}", "vLLM {{instance}}")),
                lines("Waiting calls", "", ("sum by (model) (helium_queue_calls)", "proxy {{model}}"), (f"vllm:num_requests_waiting{{{I}}}", "vLLM {{instance}}")),
                lines("Placements by reason", "Why a worker was chosen.", (rate("helium_placements_total", K, "reason"), "{{reason}}"), unit="reqps", width=8, stacked=True),
                lines("Placements by worker", "", (rate("helium_placements_total", K, "worker"), "{{worker}}"), unit="reqps", width=8, stacked=True),
                lines("Tokens computed", "Prompt tokens an engine prefilled and tokens it decoded.",
                      (rate("vllm:prompt_tokens_by_source_total", I + ',source="local_compute"', "instance"), "prefill {{instance}}"),
                      (rate("vllm:generation_tokens_total", I, "instance"), "decode {{instance}}"), width=8),
            ),
        ),
        (
            "KV memory",
            (
                lines("KV in use by running calls", "vLLM's own; resident prefixes do not count.", (f"vllm:kv_cache_usage_perc{{{I}}}", "{{instance}}"), unit="percentunit", top=1, width=8),
                lines("Resident, as the proxy believes", "Share of the KV blocks.", (f"helium_worker_resident_blocks{{{K}}} / helium_worker_capacity_blocks{{{K}}}", "{{worker}}"), unit="percentunit", top=1, width=8),
                lines("Prefix cache hit rate", "vLLM's own.", (f"{rate('vllm:prefix_cache_hits_total', I, 'instance')} / {rate('vllm:prefix_cache_queries_total', I, 'instance')}", "{{instance}}"), unit="percentunit", top=1, width=8),
                lines("Pins against budget", "Blocks.", (f"helium_worker_pinned_blocks{{{K}}}", "pinned {{worker}}"), (f"helium_worker_pin_budget_blocks{{{K}}}", "budget {{worker}}"), width=8),
                lines("Directives", "Sent to the workers.", (rate("helium_directives_total", "", "kind, result"), "{{kind}} {{result}}"), width=8),
                lines("Preemptions", "", (rate("vllm:num_preemptions_total", I, "instance"), "{{instance}}"), width=8),
                lines("KV events", "", (rate("helium_kv_events_total", K, "worker"), "{{worker}}"), (rate("helium_kv_event_gaps_total", K, "worker"), "gaps {{worker}}"), width=12),
                lines("Capacity", "Blocks a worker has.", (f"helium_worker_capacity_blocks{{{K}}}", "{{worker}}"), width=12),
            ),
        ),
        (
            "Speed",
            (
                lines("Time to first token, p95", "vLLM's own, and ours from arrival.", (quantile(0.95, "vllm:time_to_first_token_seconds", I, "instance"), "vLLM {{instance}}"),
                      (quantile(0.95, "helium_first_byte_seconds"), "client"), unit="s", width=8),
                lines("Between tokens, p95", "", (quantile(0.95, "vllm:inter_token_latency_seconds", I, "instance"), "{{instance}}"), unit="s", width=8),
                lines("Whole call, p95", "", (quantile(0.95, "vllm:e2e_request_latency_seconds", I, "instance"), "vLLM {{instance}}"), (quantile(0.95, "helium_upstream_seconds", K, "worker"), "proxy {{worker}}"), unit="s", width=8),
                lines("Queue, prefill and decode in the engine, mean", "", (mean("vllm:request_queue_time_seconds", I), "queue"), (mean("vllm:request_prefill_time_seconds", I), "prefill"),
                      (mean("vllm:request_decode_time_seconds", I), "decode"), unit="s", width=8),
                lines("Measured prefill rate", "What the planner reckons with.", (f"helium_worker_prefill_tokens_per_second{{{K}}}", "{{worker}}"), width=8),
                lines("Measured decode rate", "Of one call.", (f"helium_worker_decode_tokens_per_second{{{K}}}", "{{worker}}"), width=8),
            ),
        ),
        (
            "The proxy itself",
            (
                lines("Overhead of a call", "The proxy's own work before it is queued.", (quantile(0.5, "helium_overhead_seconds"), "p50"), (quantile(0.99, "helium_overhead_seconds"), "p99"), unit="s", width=8),
                lines("One dispatch decision", "", (quantile(0.5, "helium_decide_seconds"), "p50"), (quantile(0.99, "helium_decide_seconds"), "p99"), unit="s", width=8),
                lines("Requests by status", "", (rate("helium_http_requests_total", "", "status"), "{{status}}"), unit="reqps", width=8),
                lines("Errors by kind", "", (rate("helium_errors_total", "", "kind"), "{{kind}}"), (rate("helium_fail_open_total", "", "room"), "passed without {{room}}"), width=8),
                lines("Retries and opened breakers", "", (rate("helium_retries_total", "", "reason"), "retry {{reason}}"), (rate("helium_breaker_opens_total", "", "worker"), "breaker {{worker}}"), width=8),
                lines("Streams", "", ("sum(helium_streams_open)", "open"), (rate("helium_client_disconnects_total"), "disconnects/s"), width=8),
            ),
        ),
    ),
    (WORKER,),
)  # fmt: skip


def main() -> None:
    OUT.mkdir(exist_ok=True)
    for dashboard in (SAVINGS, WORKFLOWS, WORKERS):
        name = dashboard.uid.removeprefix("helium-")
        (OUT / f"{name}.json").write_text(json.dumps(dashboard.json(), indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
