"""Models that generate: latency, KV cache, batch."""

from grafana_foundation_sdk.builders.dashboard import Dashboard

from dashboards.panels import (
    Query,
    chosen,
    filled,
    heat,
    lines,
    page,
    quantiles,
    rate,
    row,
    total,
    variable,
)


def generator() -> Dashboard:
    """The page."""
    board = page(
        "generator",
        "Tandem: generator",
        "Latency, KV cache and batches of language models.",
        [variable("model", "tandem_kv_cache_usage_ratio")],
    )
    hits = "ray_vllm_prefix_cache_hits_total"
    queries = "ray_vllm_prefix_cache_queries_total"
    panels = [
        row("Latency"),
        heat("Time to the first bytes (TTFT)", "tandem_ttft_seconds"),
        heat("Between writes of a stream (ITL)", "tandem_itl_seconds"),
        lines("TTFT", "s", *quantiles("tandem_ttft_seconds", 0.5, 0.95, 0.99)),
        lines("ITL", "s", *quantiles("tandem_itl_seconds", 0.5, 0.95, 0.99)),
        lines("TPOT", "s", *quantiles("tandem_tpot_seconds", 0.5, 0.95, 0.99)),
        row("KV cache"),
        lines(
            "Blocks in use",
            "percentunit",
            Query(f"max by (model) ({chosen('tandem_kv_cache_usage_ratio')})"),
        ),
        lines(
            "Prompt tokens found in the cache",
            "percentunit",
            Query(
                f"{rate('tandem_cached_tokens_total')} / ({rate('tandem_prompt_tokens_total')} > 0)"
            ),
        ),
        lines(
            "Preemptions",
            "short",
            Query(
                _by_model("ray_vllm_num_preemptions_total"),
                "{{model_name}}",
            ),
        ),
        lines(
            "vLLM: blocks in use",
            "percentunit",
            Query("ray_vllm_kv_cache_usage_perc", "{{model_name}} {{ReplicaId}}"),
        ),
        lines(
            "vLLM: prefix hits",
            "percentunit",
            Query(
                f"{_by_model(hits)} / ({_by_model(queries)} > 0)",
                "{{model_name}}",
            ),
        ),
        lines(
            "vLLM: tokens",
            "short",
            Query(
                _by_model("ray_vllm_prompt_tokens_total"),
                "{{model_name}} prompt",
            ),
            Query(
                _by_model("ray_vllm_generation_tokens_total"),
                "{{model_name}} generated",
            ),
        ),
        row("Batch"),
        lines(
            "Running and waiting",
            "short",
            Query(total("tandem_running_requests"), "{{model}} running"),
            Query(total("tandem_waiting_requests"), "{{model}} waiting"),
        ),
        lines(
            "vLLM: running and waiting",
            "short",
            Query("ray_vllm_num_requests_running", "{{model_name}} running"),
            Query("ray_vllm_num_requests_waiting", "{{model_name}} waiting"),
        ),
        lines(
            "vLLM: tokens in a step",
            "short",
            Query(
                _vllm_quantile(0.5, "iteration_tokens_total"),
                "{{model_name}} median",
            ),
        ),
        lines(
            "vLLM: where a request's time goes, p95",
            "s",
            *(_vllm_p95(part) for part in ("queue", "prefill", "decode")),
        ),
    ]
    return filled(board, panels)


def _by_model(counter: str) -> str:
    return f"sum by (model_name) (rate({counter}[$__rate_interval]))"


def _vllm_p95(part: str) -> Query:
    return Query(_vllm_quantile(0.95, f"request_{part}_time_seconds"), f"{{{{model_name}}}} {part}")


def _vllm_quantile(quantile: float, histogram: str) -> str:
    buckets = f"rate(ray_vllm_{histogram}_bucket[$__rate_interval])"
    return f"histogram_quantile({quantile:g}, sum by (model_name, le) ({buckets}))"
