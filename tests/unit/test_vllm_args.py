import os
from argparse import Namespace

import pytest

from cluster.config import GeneratorConfig
from cluster.engines import vllm_args
from cluster.errors import ConfigError


def config(**fields: object) -> GeneratorConfig:
    return GeneratorConfig.model_validate({"name": "chat", "model": "m", **fields})


@pytest.mark.parametrize(
    ("cores", "workers", "binding"),
    [
        ([0, 1], 1, "0,1"),
        ([0, 1], 2, "0|1"),
        ([2, 3, 5, 7, 8], 2, "2,3|5,7"),
        ([4], 2, "4|4"),
    ],
)
def test_every_worker_gets_its_share_of_the_cores(
    cores: list[int], workers: int, binding: str
) -> None:
    assert vllm_args.bind_threads(cores, workers) == binding


def test_variables_that_are_set_are_kept() -> None:
    variables = {"VLLM_LOGGING_LEVEL": "DEBUG"}
    environment = vllm_args.Environment(variables)
    environment.add(vllm_args.environment_for("an/id"))
    environment.add(vllm_args.cpu_environment_for(config()))
    assert variables["VLLM_LOGGING_LEVEL"] == "DEBUG"
    assert variables["TANDEM_ENGINE_PARENT"] == str(os.getpid())
    assert variables["VLLM_ENABLE_V1_MULTIPROCESSING"] == "0"
    environment.restore()
    assert variables == {"VLLM_LOGGING_LEVEL": "DEBUG"}


@pytest.mark.parametrize(
    ("binding", "threads"),
    [("0,1", 2), ("0-3", 4), ("0,2-3|4-6", 3), ("7", 1), ("auto", None), ("nobind", None)],
)
def test_a_worker_computes_with_as_many_threads_as_it_has_cores(
    binding: str, threads: int | None
) -> None:
    wanted = vllm_args.threads_environment({"VLLM_CPU_OMP_THREADS_BIND": binding})
    assert wanted == ({} if threads is None else {"OMP_NUM_THREADS": str(threads)})


def test_a_replaced_variable_comes_back() -> None:
    variables = {"OMP_NUM_THREADS": "1"}  # as Ray sets it
    environment = vllm_args.Environment(variables)
    environment.replace({"OMP_NUM_THREADS": "2"})
    environment.replace({"OMP_NUM_THREADS": "4", "NEW": "x"})
    assert variables == {"OMP_NUM_THREADS": "4", "NEW": "x"}
    environment.restore()
    assert variables == {"OMP_NUM_THREADS": "1"}


def test_a_local_model_asks_nobody(tmp_path: object) -> None:
    assert vllm_args.environment_for(str(tmp_path))["HF_HUB_OFFLINE"] == "1"
    assert "HF_HUB_OFFLINE" not in vllm_args.environment_for("an/id")


def fill(chosen: GeneratorConfig, defaults: dict[str, object] | None = None) -> Namespace:
    args = Namespace(
        max_num_seqs=None, block_size=None, kv_cache_memory_bytes=None, scheduling_policy="fcfs"
    )
    vllm_args.fill_args(args, chosen, "/models/m", defaults or {})
    return args


def test_the_configuration_goes_over_the_defaults() -> None:
    args = fill(
        config(engine_args={"block_size": 16}, kv_cache_memory_bytes="2MiB"),
        {"block_size": 32, "kv_cache_memory_bytes": 1},
    )
    assert (args.block_size, args.kv_cache_memory_bytes) == (16, 2 * 1024**2)
    assert (args.model, args.served_model_name) == ("/models/m", ["chat"])


def test_adapters_switch_lora_on() -> None:
    assert not hasattr(fill(config()), "enable_lora")
    args = fill(config(adapters={"law": "a", "art": "b"}))
    assert (args.enable_lora, args.max_loras) == (True, 2)
    for name, value in (("lora_modules", ["law=a"]), ("enable_lora", True)):
        with pytest.raises(ConfigError, match=rf"{name}.*`adapters`"):
            fill(config(engine_args={name: value}))


def test_the_engine_schedules_by_the_routers_classes_unless_it_is_told_not_to() -> None:
    assert fill(config()).scheduling_policy == "priority"
    assert fill(config(engine_args={"scheduling_policy": "fcfs"})).scheduling_policy == "fcfs"


def test_an_unknown_argument_is_named_with_its_neighbours() -> None:
    with pytest.raises(ConfigError, match=r"engine_args\.max_num_seq:.*did you mean max_num_seqs"):
        fill(config(engine_args={"max_num_seq": 4}))


def test_an_argument_that_has_a_field_is_refused() -> None:
    with pytest.raises(ConfigError, match="set the generator's `name`"):
        fill(config(engine_args={"served_model_name": "x"}))


def test_workers_run_where_the_platform_can_run_them() -> None:
    two = config(tensor_parallel_size=2)
    executor = "distributed_executor_backend"
    assert vllm_args.platform_defaults(two, on_cpu=True, in_ray=True)[executor] == "mp"
    assert vllm_args.platform_defaults(two, on_cpu=False, in_ray=True)[executor] == "ray"
    assert vllm_args.platform_defaults(two, on_cpu=False, in_ray=False)[executor] == "mp"
    assert vllm_args.platform_defaults(config(), on_cpu=False, in_ray=True) == {}


def test_bfloat16_is_avoided_where_it_is_emulated() -> None:
    for native, dtype in [(True, "auto"), (False, "float32")]:
        defaults = vllm_args.platform_defaults(
            config(), on_cpu=True, in_ray=True, native_bfloat16=native
        )
        assert defaults["dtype"] == dtype
    assert fill(config(dtype="bfloat16"), {"dtype": "float32"}).dtype == "bfloat16"
    assert fill(config(), {"dtype": "float32"}).dtype == "float32"


@pytest.mark.parametrize(("chosen", "ours"), [({}, True), ({"enforce_eager": False}, False)])
def test_what_is_compiled_gets_vllms_own_worker(chosen: dict[str, bool], ours: bool) -> None:
    asked = config(engine_args=chosen)
    defaults = vllm_args.platform_defaults(asked, on_cpu=True, in_ray=False)
    assert ("worker_cls" in defaults) == ours
    assert "worker_cls" not in vllm_args.platform_defaults(asked, on_cpu=False, in_ray=False)
