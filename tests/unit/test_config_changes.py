"""Effect of a change of each configuration field: live, or a restart of which processes."""

from collections.abc import Iterator
from typing import Any

import pytest

from cluster.config import TandemConfig, parse
from cluster.config.changes import Changes, compare, pool_version, router_version, settings
from cluster.config.section import Section

# A new field must be added here, after deciding whether running processes take it over.
ROUTER = """api_keys_sha256 operator_keys_sha256 keys_file keys_in_cluster open max_body_bytes
    max_header_bytes max_buffered_bytes max_connections_per_address header_timeout_s
    min_upload_bytes_per_s client_timeout_s max_queued max_queued_tokens max_sequences_per_request
    queue_timeout_s start_timeout_s max_answer_s handover.enabled handover.max_per_request
    handover.max_answer_bytes handover.max_kept_bytes log_requests_per_s log_prompts
    circuit_breaker.enabled circuit_breaker.max_share circuit_breaker.slow_factor hedge.enabled
    hedge.max_share tls batches.max_file_bytes batches.max_tenant_bytes batches.max_lines
    batches.max_concurrent batches.share batches.keep_days"""
REPLICAS = """replicas.min replicas.max replicas.target_in_flight replicas.upscale_delay_s
    replicas.downscale_delay_s replicas.max_surge_percent"""
RESOURCES = "resources.cpus resources.gpus resources.custom"
MEDIA = """media.allowed_domains media.allowed_networks media.max_bytes media.timeout_s
    media.max_redirects media.max_fetches media.max_pixels
    audio.max_file_bytes audio.max_duration_s"""
POOL = f"aliases max_in_flight stall_timeout_s priority routing {REPLICAS}"
LIVE = {
    "router": f"{ROUTER} {REPLICAS}",
    "budget": "cpus gpus",
    "accounting": "currency per_cpu_hour per_gpu_hour in_answers keep_days",
    "leaks": "sample_s window_s settle_s min_bytes_per_s min_growth_bytes replace pause_s",
    "devices": "interval_s fatal_xids max_temperature_celsius drain_node",
    "idempotency": "keep_s disconnect_grace_s max_answer_bytes max_kept_bytes",
    "generators.g": f"{POOL} fallbacks fallback_on slo.ttft_p90_s slo.itl_p90_s {MEDIA}",
    "classifiers.c": f"{POOL} max_queued_tokens max_texts slo.latency_p95_s",
}
SIM = """startup_s prefill_s_per_token decode_s_per_token batch_slowdown max_num_seqs num_kv_blocks
    block_size_tokens seed adapter_load_s fail_rate fail_startup die_after_requests
    hang_after_requests leak_bytes_per_request"""
GENERATOR = f"""model engine tensor_parallel_size pipeline_parallel_size dtype quantization
    max_model_len kv_cache_memory_bytes adapters tool_call_parser reasoning_parser engine_args
    media.max_items {RESOURCES} {" ".join(f"sim.{name}" for name in SIM.split())}"""
CLASSIFIER = f"""model tasks dtype max_batch_tokens threads result_cache.max_bytes
    result_cache.isolate_tenants {RESOURCES}"""
RESTARTING = {
    ("generator-g",): {"generators.g": GENERATOR},
    ("classifier-c",): {"classifiers.c": CLASSIFIER},
    ("router",): {"router": f"{RESOURCES} batches.enabled batches.directory batches.database"},
    ("classifier-c", "generator-g"): {"accounting": "energy watts_per_core interval_s"},
    ("classifier-c", "generator-g", "router"): {
        "tracing": "endpoint headers sample_ratio max_queued_spans export_interval_s"
    },
}
CLUSTER = """num_cpus ray_port dashboard_port prometheus_port grafana_port
    object_store_memory_bytes ready_timeout_s"""


def paths(by_section: dict[str, str]) -> set[str]:
    return {f"{section}.{name}" for section, names in by_section.items() for name in names.split()}


def make(**fields: Any) -> TandemConfig:
    pools = {
        "generators": [{"name": "g", "model": "m"}],
        "classifiers": [{"name": "c", "model": "m"}],
    }
    return parse({**pools, "tracing": {"endpoint": "http://h/v1/traces"}, **fields})


def all_paths(config: TandemConfig) -> Iterator[str]:
    yield from (each.path for each in settings(config) if "." in each.path)
    for pool in config.pools:
        below = settings(pool, f"{pool.kind}s.{pool.name}.")
        other = (".name", ".version", ".rollout")  # these change the deployments
        yield from (each.path for each in below if not each.path.endswith(other))


def changed(section: Any, path: list[str], value: Any) -> Any:
    """Return a copy of a section with another value, which need not be valid."""
    name, *below = path
    if not isinstance(section, Section):
        return tuple(changed(pool, below, value) for pool in section)
    inner = changed(getattr(section, name), below, value) if below else value
    return section.model_copy(update={name: inner})


def effect(path: str) -> Changes:
    return compare(make(), changed(make(), path.split("."), ("changed",)))


@pytest.mark.parametrize("path", sorted(all_paths(make())))
def test_effect_of_each_field(path: str) -> None:
    changes = effect(path)
    assert (changes.added, changes.removed) == ((), ())
    expected = {
        name: (path,) for names, by in RESTARTING.items() if path in paths(by) for name in names
    }
    assert changes.restarts == expected
    assert changes.cluster == ((path,) if path in paths({"cluster": CLUSTER}) else ())
    assert changes.live == ((path,) if path in paths(LIVE) else ())
    assert bool(expected) + bool(changes.cluster) + bool(changes.live) == 1


def versions(config: TandemConfig) -> dict[str, str]:
    pools = {pool.deployment: pool_version(pool, config.operations) for pool in config.pools}
    return {"router": router_version(config), **pools}


@pytest.mark.parametrize("path", sorted(all_paths(make())))
def test_the_versions_that_differ_are_those_of_the_restarting_deployments(path: str) -> None:
    before, after = versions(make()), versions(changed(make(), path.split("."), ["changed"]))
    differing = {name for name in before if before[name] != after[name]}
    assert differing == effect(path).restarts.keys()


def test_another_pool_restarts_the_routers_only() -> None:
    generators = [{"name": name, "model": "m"} for name in ("g", "h")]
    changes = compare(make(), make(generators=generators))
    assert changes == Changes((), {"router": ("names of the pools",)}, (), ("generator-h",), ())
    assert compare(make(generators=generators), make()).removed == ("generator-h",)


def test_a_rollout_restarts_the_routers_only() -> None:
    pool = {"name": "g", "model": "m"}
    rollout = {"model": "n", "version": "2"}
    before, running = make(), make(generators=[{**pool, "rollout": rollout}])
    after = make(generators=[{**pool, **rollout}])
    begin, end = compare(before, running), compare(running, after)
    for changes in (begin, end):
        assert changes.restarts == {"router": ("names of the pools",)}
    assert (begin.added, begin.removed) == (("generator-g@2",), ())
    assert (end.added, end.removed) == ((), ("generator-g",))


def test_equal_configurations_have_no_changes() -> None:
    assert compare(make(), make()).is_empty


@pytest.mark.parametrize("adapters", [{"law": "p"}, {"law": "p", "art": "p"}, {"art": "q"}])
def test_adapters_change_live_if_the_engine_supports_them(adapters: dict[str, str]) -> None:
    def with_adapters(adapters: dict[str, str], **engine_args: int) -> TandemConfig:
        pool = {"name": "g", "model": "m", "adapters": adapters, "engine_args": engine_args}
        return make(generators=[pool])

    changes = compare(with_adapters({"law": "other"}), with_adapters(adapters))
    assert (changes.live, changes.restarts) == (("generators.g.adapters",), {})
    changes = compare(with_adapters({}, max_loras=2), with_adapters(adapters, max_loras=2))
    assert (changes.live, changes.restarts) == (("generators.g.adapters",), {})
    changes = compare(with_adapters({}), with_adapters(adapters))
    assert changes.restarts == {"generator-g": ("generators.g.adapters",)}
