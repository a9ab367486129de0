"""Metrics of Ray, vLLM and Prometheus that Tandem's rules, dashboards and docs use."""

RAY = {
    "ray_component_rss_bytes": "Resident memory of Ray's processes and workers by component.",
    "ray_node_cpu_utilization": "CPU utilization of a node in percent.",
    "ray_node_disk_free": "Free disk space of a node in bytes.",
    "ray_node_disk_usage": "Used disk space of a node in bytes.",
    "ray_node_mem_total": "Memory of a node in bytes.",
    "ray_node_mem_used": "Used memory of a node in bytes.",
    "ray_serve_deployment_error_counter_total": "Requests of a deployment with an exception.",
    "ray_serve_deployment_processing_latency_ms_bucket": "Duration of a deployment's requests.",
    "ray_serve_deployment_replica_healthy": "Healthy replicas of a deployment.",
    "ray_serve_deployment_replica_starts_total": "1 for each replica started.",
    "ray_serve_deployment_request_counter_total": "Requests of a deployment.",
    "ray_serve_health_check_failures_total": "Failed health checks of replicas.",
}

VLLM = {
    "ray_vllm_generation_tokens_total": "Completion tokens generated.",
    "ray_vllm_iteration_tokens_total_bucket": "Tokens per engine step.",
    "ray_vllm_kv_cache_usage_perc": "Share of KV blocks in use, 0 to 1.",
    "ray_vllm_num_preemptions_total": "Preempted requests.",
    "ray_vllm_num_requests_running": "Requests in the batch.",
    "ray_vllm_num_requests_waiting": "Requests waiting in the engine.",
    "ray_vllm_prefix_cache_hits_total": "Prompt tokens found in the prefix cache.",
    "ray_vllm_prefix_cache_queries_total": "Prompt tokens looked up in the prefix cache.",
    "ray_vllm_prompt_tokens_total": "Prompt tokens, computed or cached.",
    "ray_vllm_request_decode_time_seconds_bucket": "Decode time of a request.",
    "ray_vllm_request_prefill_time_seconds_bucket": "Prefill time of a request.",
    "ray_vllm_request_queue_time_seconds_bucket": "Time a request waited in the engine.",
}

PROMETHEUS = {"up": "1 if the target could be scraped."}

FOREIGN = {**RAY, **VLLM, **PROMETHEUS}
