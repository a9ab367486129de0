"""GPUs: reservation at the start, validation, and vLLM's share of a card."""

from pathlib import Path
from typing import Any

import pytest

from cluster.config import GeneratorConfig, TandemConfig, parse
from cluster.config.file import load
from cluster.engines.vllm.arguments import platform_defaults
from cluster.errors import ConfigError
from cluster.launch import gpus
from cluster.launch.gpus import check_gpus_fit, count_gpus, gpu_settings
from tests.running import ROOT


def generator(name: str = "g", replicas: Any = None, **fields: Any) -> dict[str, Any]:
    return {"name": name, "model": "m", "replicas": replicas or {}, **fields}


def config(*generators: dict[str, Any], classifiers: int = 0) -> TandemConfig:
    pools = [{"name": f"c{i}", "model": "m"} for i in range(classifiers)]
    return parse({"generators": generators, "classifiers": pools})


def reserved(tree: TandemConfig, num_gpus: int) -> dict[str, str]:
    return dict(setting.split("=") for setting in gpu_settings(tree, num_gpus))


def test_the_default_configuration_shares_one_gpu_and_fits() -> None:
    path = ROOT / "ray-config.yaml"
    settings = gpu_settings(load(path).config, 1)
    assert settings == [
        "generators.0.resources.gpus=0.4",
        "classifiers.0.resources.gpus=0.1",
        "budget.gpus=1",
    ]
    loaded = load(path, settings).config
    assert [pool.resources.gpus for pool in loaded.generators] == [0.4]
    assert loaded.generators[0].stall_timeout_s == 120  # not the longer one of CPUs
    check_gpus_fit(loaded, 1)


@pytest.mark.parametrize(
    ("tree", "num_gpus", "shares"),
    [
        (config(generator()), 0, {}),
        (config(generator()), 1, {"generators.0": "1"}),
        (config(generator(), classifiers=1), 2, {"generators.0": "1", "classifiers.0": "0.1"}),
        (config(generator(replicas={"max": 3})), 1, {"generators.0": "0.33"}),
        (config(generator(replicas={"max": 3})), 2, {"generators.0": "0.5"}),
        (config(generator(tensor_parallel_size=4)), 4, {"generators.0": "1"}),
        # A pool that says 0 stays on the CPUs.
        (config(generator(resources={"gpus": 0})), 1, {}),
        (config(generator(engine="sim")), 1, {}),
        # The rest of a card.
        (
            config(generator("a", resources={"gpus": 0.5}), generator("b")),
            1,
            {"generators.1": "0.5"},
        ),
        (
            config(generator("a", resources={"gpus": 0.5}), generator("b"), classifiers=1),
            1,
            {"generators.1": "0.4", "classifiers.0": "0.1"},
        ),
        (
            config(generator("a", resources={"gpus": 1}), generator("b", {"max": 2})),
            2,
            {"generators.1": "0.5"},
        ),
    ],
)
def test_pools_that_mention_no_gpus_get_a_share(
    tree: TandemConfig, num_gpus: int, shares: dict[str, str]
) -> None:
    budget = {"budget.gpus": str(num_gpus)} if num_gpus else {}
    wanted = {f"{pool}.resources.gpus": share for pool, share in shares.items()}
    assert reserved(tree, num_gpus) == {**wanted, **budget}


@pytest.mark.parametrize(
    ("replicas", "share", "num_gpus", "fits"),
    [
        (2, 1.0, 2, True),
        (3, 1.0, 2, False),
        (2, 0.5, 1, True),
        (2, 0.6, 1, False),  # 1.2 on one card
        (3, 0.6, 2, False),  # 1.8 in total, but no two on one card
        (1, 0.5, 0, False),
    ],
)
def test_the_smallest_number_of_replicas_must_fit(
    replicas: int, share: float, num_gpus: int, fits: bool
) -> None:
    counts = {"min": replicas, "max": replicas}
    tree = config(generator(replicas=counts, resources={"gpus": share}))
    if fits:
        check_gpus_fit(tree, num_gpus)
        return
    with pytest.raises(ConfigError) as caught:
        check_gpus_fit(tree, num_gpus)
    assert str(caught.value) == (
        f"resources.gpus: replicas.min of the pools needs more GPUs (g {replicas} x {share:g}) "
        f"than this machine has ({num_gpus}); lower replicas.min, or share GPUs with fractions "
        f"such as `gpus: 0.5`"
    )


@pytest.mark.parametrize(
    ("visible", "count"), [(None, 2), ("1", 1), ("", 0), ("-1", 0), ("0,-1,1", 1), ("0,1,2", 2)]
)
def test_gpus_are_counted_without_nvidia_ml_py(
    visible: str | None, count: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("0000:01:00.0", "0000:02:00.0"):
        (tmp_path / name).mkdir()
    monkeypatch.setattr(gpus, "DRIVER", tmp_path)
    monkeypatch.setattr(gpus, "load_nvml", lambda: None)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert count_gpus() == count


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"tensor_parallel_size": 2, "resources": {"gpus": 0.5}},
            "resources.gpus is 0.5; it counts the GPUs of each of the 2 workers "
            "(tensor_parallel_size * pipeline_parallel_size), so write `gpus: 1`",
        ),
        (
            {"tensor_parallel_size": 2, "resources": {"gpus": 2}},
            "resources.gpus is 2; it counts the GPUs of each of the 2 workers",
        ),
        (
            {"resources": {"gpus": 4}},
            "resources.gpus is 4, but one worker uses one GPU; write `tensor_parallel_size: 4` and "
            "`gpus: 1`, which is per worker",
        ),
        (
            {"engine_args": {"data_parallel_size": 2}},
            "engine_args.data_parallel_size is 2; set the generator's `replicas`, each of which is "
            "a data-parallel rank, instead",
        ),
    ],
)
def test_gpus_that_do_not_match_the_workers_are_refused(
    fields: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        config(generator(**fields))
    assert message in str(caught.value)


def test_a_classifier_uses_at_most_one_gpu() -> None:
    pool = {"name": "c", "model": "m", "resources": {"gpus": 2}}
    with pytest.raises(ConfigError, match="write `gpus: 1` and more replicas"):
        parse({"classifiers": [pool]})


@pytest.mark.parametrize(("share", "utilization"), [(0.4, 0.36), (0.5, 0.45), (1, None), (0, None)])
def test_replicas_on_one_gpu_divide_its_memory(share: float, utilization: float | None) -> None:
    pool = GeneratorConfig.model_validate(generator(resources={"gpus": share}))
    defaults = platform_defaults(pool, on_cpu=False, in_ray=True)
    assert defaults.get("gpu_memory_utilization") == utilization
