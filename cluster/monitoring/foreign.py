"""Metrics that others make and Tandem's rules and dashboards use, by their names in Prometheus."""

RAY = {
    "ray_component_rss_bytes": "Resident memory of Ray's processes and workers, by component.",
    "ray_node_cpu_utilization": "CPU use of a node in percent.",
    "ray_node_disk_free": "Free bytes of a node's disk.",
    "ray_node_disk_usage": "Used bytes of a node's disk.",
    "ray_node_mem_total": "Memory of a node in bytes.",
    "ray_node_mem_used": "Memory in use on a node in bytes.",
    "ray_serve_deployment_replica_healthy": "Healthy replicas of a deployment.",
    "ray_serve_deployment_replica_starts_total": "1 for each replica that was started.",
    "ray_serve_health_check_failures_total": "Health checks of replicas that failed.",
}

VLLM = {
    "ray_vllm_generation_tokens_total": "Tokens that vLLM generated.",
    "ray_vllm_iteration_tokens_total_bucket": "Tokens in one step of the engine.",
    "ray_vllm_kv_cache_usage_perc": "Share of the KV blocks in use, 0 to 1.",
    "ray_vllm_num_preemptions_total": "Requests that lost their KV blocks to others.",
    "ray_vllm_num_requests_running": "Requests in the batch.",
    "ray_vllm_num_requests_waiting": "Requests that wait in the engine.",
    "ray_vllm_prefix_cache_hits_total": "Prompt tokens that the prefix cache held.",
    "ray_vllm_prefix_cache_queries_total": "Prompt tokens that were looked up in it.",
    "ray_vllm_prompt_tokens_total": "Prompt tokens that vLLM computed or found.",
    "ray_vllm_request_decode_time_seconds_bucket": "Time in which a request's tokens came.",
    "ray_vllm_request_prefill_time_seconds_bucket": "Time of a request's prefill.",
    "ray_vllm_request_queue_time_seconds_bucket": "Time that a request waited in the engine.",
}

PROMETHEUS = {"up": "1 where a target answers."}

FOREIGN = {**RAY, **VLLM, **PROMETHEUS}
