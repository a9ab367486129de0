"""Generator dashboard: latency, KV cache and batches of LLMs."""

from grafana_foundation_sdk.builders.dashboard import Dashboard

from dashboards.panels import (
    Query,
    add_panels,
    graph,
    heatmap_panel,
    make_dashboard,
    make_variable,
    quantiles,
    rate_of,
    section,
    selected,
    sum_of,
)


def generator() -> Dashboard:
    board = make_dashboard(
        "generator",
        "Tandem: generator",
        "Latency, KV cache and batches of LLMs.",
        [make_variable("model", "tandem_kv_cache_usage_ratio")],
    )
    cached = rate_of("tandem_cached_tokens_total")
    prompts = rate_of("tandem_prompt_tokens_total")
    hits = "ray_vllm_prefix_cache_hits_total"
    queries = "ray_vllm_prefix_cache_queries_total"
    panels = [
        section("Latency"),
        heatmap_panel("Time to first byte (TTFT)", "tandem_ttft_seconds"),
        heatmap_panel("Inter-token latency (ITL)", "tandem_itl_seconds"),
        graph("TTFT", "s", *quantiles("tandem_ttft_seconds", 0.5, 0.95, 0.99)),
        graph("ITL", "s", *quantiles("tandem_itl_seconds", 0.5, 0.95, 0.99)),
        graph("TPOT", "s", *quantiles("tandem_tpot_seconds", 0.5, 0.95, 0.99)),
        section("KV cache"),
        graph(
            "KV cache usage",
            "percentunit",
            Query(f"max by (model) ({selected('tandem_kv_cache_usage_ratio')})"),
        ),
        graph(
            "Prefix cache hit rate (tokens)", "percentunit", Query(f"{cached} / ({prompts} > 0)")
        ),
        graph(
            "Preemptions per second",
            "short",
            Query(_by_model("ray_vllm_num_preemptions_total"), "{{model_name}}"),
        ),
        graph(
            "vLLM: KV cache usage",
            "percentunit",
            Query("ray_vllm_kv_cache_usage_perc", "{{model_name}} {{ReplicaId}}"),
        ),
        graph(
            "vLLM: prefix cache hit rate",
            "percentunit",
            Query(f"{_by_model(hits)} / ({_by_model(queries)} > 0)", "{{model_name}}"),
        ),
        graph(
            "vLLM: tokens per second",
            "short",
            Query(_by_model("ray_vllm_prompt_tokens_total"), "{{model_name}} prompt"),
            Query(_by_model("ray_vllm_generation_tokens_total"), "{{model_name}} completion"),
        ),
        section("Speech"),
        graph("Seconds of audio per second", "short", Query(rate_of("tandem_audio_seconds_total"))),
        section("Batches"),
        graph(
            "Running and waiting requests",
            "short",
            Query(sum_of("tandem_running_requests"), "{{model}} running"),
            Query(sum_of("tandem_waiting_requests"), "{{model}} waiting"),
        ),
        graph(
            "vLLM: running and waiting requests",
            "short",
            Query("ray_vllm_num_requests_running", "{{model_name}} running"),
            Query("ray_vllm_num_requests_waiting", "{{model_name}} waiting"),
        ),
        graph(
            "vLLM: tokens per step",
            "short",
            Query(_vllm_quantile(0.5, "iteration_tokens_total"), "{{model_name}} median"),
        ),
        graph(
            "vLLM: request time by phase, p95",
            "s",
            *(_vllm_p95(part) for part in ("queue", "prefill", "decode")),
        ),
    ]
    return add_panels(board, panels)


def _by_model(counter: str) -> str:
    return f"sum by (model_name) (rate({counter}[$__rate_interval]))"


def _vllm_p95(part: str) -> Query:
    return Query(_vllm_quantile(0.95, f"request_{part}_time_seconds"), f"{{{{model_name}}}} {part}")


def _vllm_quantile(quantile: float, histogram: str) -> str:
    buckets = f"rate(ray_vllm_{histogram}_bucket[$__rate_interval])"
    return f"histogram_quantile({quantile:g}, sum by (model_name, le) ({buckets}))"
