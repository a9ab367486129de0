"""vLLM's environment variables and arguments follow from the configuration and the platform."""

import os
from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace

import pytest

from cluster.config import GeneratorConfig
from cluster.engines.vllm import arguments, environment
from cluster.engines.vllm.environment import core_share
from cluster.errors import ConfigError


def config(**fields: object) -> GeneratorConfig:
    return GeneratorConfig.model_validate({"name": "chat", "model": "m", **fields})


# -- environment -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cores", "workers", "binding"),
    [
        ([0, 1], 1, "0,1"),
        ([0, 1], 2, "0|1"),
        ([2, 3, 5, 7, 8], 2, "2,3|5,7"),
        ([4], 2, "4|4"),
    ],
)
def test_each_worker_gets_its_share_of_the_cores(
    cores: list[int], workers: int, binding: str
) -> None:
    assert environment.bind_threads(cores, workers) == binding


@pytest.mark.parametrize(
    ("binding", "threads"),
    [("0,1", 2), ("0-3", 4), ("0,2-3|4-6", 3), ("7", 1), ("auto", None), ("nobind", None)],
)
def test_a_worker_uses_one_thread_per_core(binding: str, threads: int | None) -> None:
    wanted = environment.threads_environment({"VLLM_CPU_OMP_THREADS_BIND": binding})
    assert wanted == ({} if threads is None else {"OMP_NUM_THREADS": str(threads)})


def test_cores_of_a_binding_must_be_usable() -> None:
    for binding in ("0,1", "0-1|2", "auto", "nobind"):
        environment.check_binding(binding, config(), {0, 1, 2})
    with pytest.raises(ConfigError, match=r"may not use the cores \[3, 4\]; it may use \[0, 1\]"):
        environment.check_binding("0|1,3-4", config(), {0, 1})


def test_a_binding_that_replicas_share_is_reported(caplog: pytest.LogCaptureFixture) -> None:
    for number, binding in ((1, "0,1"), (2, "nobind")):
        environment.check_binding(binding, config(replicas={"max": number}), {0, 1})
    assert caplog.records == []
    environment.check_binding("0,1", config(replicas={"max": 2}), {0, 1})
    assert "binds all replicas of a node to the same cores" in caplog.text


def test_defaults_do_not_replace_set_variables() -> None:
    variables = {"VLLM_LOGGING_LEVEL": "DEBUG"}
    engine_environment = environment.Environment(variables)
    engine_environment.set_defaults(environment.base_environment("an/id"))
    engine_environment.set_defaults(environment.cpu_environment(config()))
    assert variables["VLLM_LOGGING_LEVEL"] == "DEBUG"
    assert variables["TANDEM_ENGINE_PARENT"] == str(os.getpid())
    assert variables["VLLM_ENABLE_V1_MULTIPROCESSING"] == "0"
    engine_environment.restore()
    assert variables == {"VLLM_LOGGING_LEVEL": "DEBUG"}


def test_intels_openmp_is_preloaded_unless_another_one_is(tmp_path: Path) -> None:
    library = tmp_path / "libiomp5.so"
    assert environment.preload_environment({}, library) == {}
    library.touch()
    assert environment.preload_environment({}, library) == {"LD_PRELOAD": str(library)}
    wanted = {"LD_PRELOAD": f"{library}:/lib/a.so"}
    assert environment.preload_environment({"LD_PRELOAD": "/lib/a.so"}, library) == wanted
    assert environment.preload_environment({"LD_PRELOAD": "/lib/libgomp.so.1"}, library) == {}


@pytest.mark.parametrize(
    ("preload", "found"),
    [
        ("", None),
        ("/opt/libomp/lib/libother.so", None),
        ("/lib/a.so:/lib/libgomp.so.1", "/lib/libgomp.so.1"),
        ("/lib/a.so /lib/libomp.so:/lib/libiomp5.so", "/lib/libomp.so"),
        ("libiomp5.so libgomp.so.1", "libiomp5.so"),
    ],
)
def test_the_first_preloaded_openmp_takes_precedence(preload: str, found: str | None) -> None:
    assert environment.preloaded_openmp({"LD_PRELOAD": preload}) == found


def test_restore_brings_replaced_variables_back() -> None:
    variables = {"OMP_NUM_THREADS": "1"}  # as Ray sets it
    engine_environment = environment.Environment(variables)
    engine_environment.set_all({"OMP_NUM_THREADS": "2"})
    engine_environment.set_all({"OMP_NUM_THREADS": "4", "NEW": "x"})
    assert variables == {"OMP_NUM_THREADS": "4", "NEW": "x"}
    engine_environment.restore()
    assert variables == {"OMP_NUM_THREADS": "1"}


def test_the_hugging_face_hub_is_offline_for_local_models(tmp_path: Path) -> None:
    assert environment.base_environment(str(tmp_path))["HF_HUB_OFFLINE"] == "1"
    assert "HF_HUB_OFFLINE" not in environment.base_environment("an/id")


# -- arguments -------------------------------------------------------------------------------------


def fill(chosen: GeneratorConfig, defaults: dict[str, object] | None = None) -> Namespace:
    args = Namespace(
        max_num_seqs=None, block_size=None, kv_cache_memory_bytes=None, scheduling_policy="fcfs"
    )
    arguments.fill_args(args, chosen, "/models/m", defaults or {})
    return args


def test_the_configuration_overrides_platform_defaults() -> None:
    args = fill(
        config(engine_args={"block_size": 16}, kv_cache_memory_bytes="2MiB"),
        {"block_size": 32, "kv_cache_memory_bytes": 1},
    )
    assert (args.block_size, args.kv_cache_memory_bytes) == (16, 2 * 1024**2)
    assert (args.model, args.served_model_name) == ("/models/m", ["chat"])


def test_adapters_enable_lora() -> None:
    assert not hasattr(fill(config()), "enable_lora")
    args = fill(config(adapters={"law": "a", "art": "b"}))
    assert (args.enable_lora, args.max_loras) == (True, 2)


def test_scheduling_is_by_priority_unless_configured_otherwise() -> None:
    assert fill(config()).scheduling_policy == "priority"
    assert fill(config(engine_args={"scheduling_policy": "fcfs"})).scheduling_policy == "fcfs"


@pytest.mark.parametrize(
    ("backend", "chosen", "compact"),
    [
        ("auto", None, True),
        ("xgrammar", {"backend": "xgrammar"}, True),
        ("outlines", {"backend": "outlines"}, False),
        ("auto", {"disable_any_whitespace": False}, False),
    ],
)
def test_json_output_is_compact_unless_configured_otherwise(
    backend: str, chosen: object, compact: bool
) -> None:
    structured_outputs = SimpleNamespace(backend=backend, disable_any_whitespace=False)
    pool = config(engine_args={"structured_outputs_config": chosen})
    arguments.disable_free_whitespace(structured_outputs, pool)
    assert structured_outputs.disable_any_whitespace is compact


def test_an_unknown_argument_is_reported_with_similar_names() -> None:
    with pytest.raises(ConfigError, match=r"engine_args\.max_num_seq:.*did you mean max_num_seqs"):
        fill(config(engine_args={"max_num_seq": 4}))


def test_workers_use_an_executor_that_the_platform_supports() -> None:
    two = config(tensor_parallel_size=2)
    executor = "distributed_executor_backend"
    assert arguments.platform_defaults(two, on_cpu=True, in_ray=True)[executor] == "mp"
    assert arguments.platform_defaults(two, on_cpu=False, in_ray=True)[executor] == "ray"
    assert arguments.platform_defaults(two, on_cpu=False, in_ray=False)[executor] == "mp"
    assert arguments.platform_defaults(config(), on_cpu=False, in_ray=True) == {}


def test_rays_executor_is_refused_on_cpus() -> None:
    chosen = config(engine_args={"distributed_executor_backend": "ray"})
    arguments.platform_defaults(chosen, on_cpu=False, in_ray=True)
    with pytest.raises(ConfigError, match="distributed_executor_backend is 'ray', which vLLM"):
        arguments.platform_defaults(chosen, on_cpu=True, in_ray=True)


def test_bfloat16_is_avoided_on_cpus_that_emulate_it() -> None:
    for native, dtype in [(True, "auto"), (False, "float32")]:
        defaults = arguments.platform_defaults(
            config(), on_cpu=True, in_ray=True, native_bfloat16=native
        )
        assert defaults["dtype"] == dtype
    assert fill(config(dtype="bfloat16"), {"dtype": "float32"}).dtype == "bfloat16"
    assert fill(config(), {"dtype": "float32"}).dtype == "float32"


@pytest.mark.parametrize(
    ("engine_args", "is_eager"), [({}, True), ({"enforce_eager": False}, False)]
)
def test_compiled_models_keep_vllms_own_worker(
    engine_args: dict[str, bool], is_eager: bool
) -> None:
    chosen = config(engine_args=engine_args)
    defaults = arguments.platform_defaults(chosen, on_cpu=True, in_ray=False)
    assert ("worker_cls" in defaults) == is_eager
    assert "worker_cls" not in arguments.platform_defaults(chosen, on_cpu=False, in_ray=False)


def test_the_share_of_the_nodes_cores_that_a_replica_uses() -> None:
    bound = {"VLLM_CPU_OMP_THREADS_BIND": "0,1", "OMP_NUM_THREADS": "2"}
    unbound = {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "2"}
    assert core_share({}, 1, 8) == 0.0, "not on CPUs"
    assert core_share(bound, 1, 8) == 1.0, "other replicas would use the same two cores"
    assert core_share(unbound, 1, 8) == 0.25
    assert core_share(unbound, 2, 8) == 0.5


@pytest.mark.parametrize(
    ("worker", "world_size", "cache_bytes", "expected"),
    [
        (arguments.EAGER_CPU_WORKER, 1, 2**29, 2**29),
        (arguments.EAGER_CPU_WORKER, 2, 2**29, 2**30),
        ("vllm.v1.worker.cpu_worker.CPUWorker", 1, 2**29, 0),
        ("vllm.v1.worker.gpu_worker.Worker", 2, None, 0),
    ],
)
def test_only_our_workers_take_memory_when_blocks_are_first_used(
    worker: str, world_size: int, cache_bytes: int | None, expected: int
) -> None:
    vllm_config = SimpleNamespace(
        parallel_config=SimpleNamespace(worker_cls=worker, world_size=world_size),
        cache_config=SimpleNamespace(kv_cache_memory_bytes=cache_bytes),
    )
    assert arguments.on_demand_bytes(vllm_config) == expected
