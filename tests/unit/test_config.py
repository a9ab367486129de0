import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml

from cluster.config import TandemConfig, parse
from cluster.config.section import Section
from cluster.errors import ConfigError


def generator(**fields: Any) -> dict[str, Any]:
    return {"generators": [{"name": "g", "model": "m", **fields}]}


def classifier(**fields: Any) -> dict[str, Any]:
    return {"classifiers": [{"name": "c", "model": "m", **fields}]}


def test_defaults_are_filled_in() -> None:
    config = parse(generator(kv_cache_memory_bytes="512MiB"))
    (found,) = config.generators
    assert found.engine == "vllm"
    assert found.kv_cache_memory_bytes == 512 * 2**20
    assert (found.replicas.min, found.replicas.max) == (1, 1)
    assert config.router.api_keys_sha256 == ()


@pytest.mark.parametrize(
    ("tasks", "head"),
    [
        (["embed"], None),
        (["classify", "embed"], "ForSequenceClassification"),
        (["embed", "rerank", "score"], "ForSequenceClassification"),
        (["token-classification"], "ForTokenClassification"),
        (["fill-mask", "embed"], "ForMaskedLM"),
        (["next-sentence"], "ForNextSentencePrediction"),
    ],
)
def test_tasks_determine_the_required_head(tasks: list[str], head: str | None) -> None:
    assert parse(classifier(tasks=tasks)).classifiers[0].head == head


@pytest.mark.parametrize(
    ("applications", "message"),
    [
        ({"generator": "c"}, "applications.generator is 'c'; allowed: g"),
        ({"classifier": "r"}, "applications.classifier is 'r'; allowed: c"),
        ({"knowledge": {"encoder": "g"}}, "knowledge.encoder is 'g'; allowed: c, mood"),
        ({"knowledge": {"reranker": "c"}}, "knowledge.reranker is 'c'; allowed: r"),
        ({"knowledge": {"reranker": "r"}, "encoder": "mood"}, None),
    ],
)
def test_applications_name_models_that_can_do_it(
    applications: dict[str, Any], message: str | None
) -> None:
    pools = {**generator(), **classifier(aliases=["mood"])}
    pools["classifiers"].append({"name": "r", "model": "m", "tasks": ["rerank"]})
    if message is None:
        assert parse({**pools, "applications": applications}).applications is not None
        return
    with pytest.raises(ConfigError, match=re.escape(message)):
        parse({**pools, "applications": applications})


def test_without_a_reranker_none_can_be_named() -> None:
    with pytest.raises(ConfigError, match="no model has the task"):
        parse({**classifier(), "applications": {"knowledge": {"reranker": "c"}}})


def test_generators_on_cpus_may_take_longer_for_a_step() -> None:
    def timeout_s(**fields: Any) -> float:
        return parse(generator(**fields)).generators[0].stall_timeout_s

    assert timeout_s() == timeout_s(resources={"cpus": 4}) == 600
    assert timeout_s(resources={"gpus": 1}) == 120
    assert timeout_s(stall_timeout_s=30) == 30
    assert parse(classifier()).classifiers[0].stall_timeout_s == 120


@pytest.mark.parametrize(
    ("fields", "tokens"),
    [
        ({}, 1024),
        ({"resources": {"gpus": 0.1}}, 16_384),
        ({"resources": {"gpus": 1}, "max_batch_tokens": 512}, 512),
    ],
)
def test_classifiers_on_gpus_compute_larger_batches(fields: dict[str, Any], tokens: int) -> None:
    pool = {"name": "c", "model": "m", **fields}
    assert parse({"classifiers": [pool]}).classifiers[0].max_batch_tokens == tokens


def test_max_loras_is_the_number_of_adapters_up_to_a_default_limit() -> None:
    def max_loras(number: int, **args: int) -> int:
        adapters = {f"a{each}": "path" for each in range(number)}
        config = parse(generator(adapters=adapters, engine_args=args))
        return config.generators[0].max_loras

    assert [max_loras(0), max_loras(3), max_loras(20), max_loras(3, max_loras=2)] == [1, 3, 8, 2]


@pytest.mark.parametrize("max_loras", [None, "abc", 0, -1, True])
def test_invalid_max_loras_is_rejected(max_loras: object) -> None:
    with pytest.raises(ConfigError, match="max_loras"):
        parse(generator(engine_args={"max_loras": max_loras}))


@pytest.mark.parametrize(
    ("name", "value", "advice"),
    [
        ("served_model_name", "x", "set the generator's `name` and `aliases` instead"),
        ("max_model_len", 2048, "set the generator's `max_model_len` instead"),
        ("tensor-parallel-size", 2, "set the generator's `tensor_parallel_size` instead"),
        ("nnodes", 2, "set the generator's `pipeline_parallel_size` instead"),
        ("lora_modules", ["law=a"], "set the generator's `adapters` instead"),
        ("enable_lora", True, "set the generator's `adapters` instead"),
        ("port", 9000, "set `http_options.port` instead"),
        ("api_key", "secret", "set keys with `tandem keys add` instead"),
        ("max-num-seqs", 4, "write the Python name, `max_num_seqs`"),
        ("--max-num-seqs", 4, "write the Python name, `max_num_seqs`"),
        ("max_num_seqs", "4", "it must be a number, not a string: remove the quotes"),
        ("gpu_memory_utilization", "0.9", "it must be a number, not a string: remove the quotes"),
        ("max_loras", "4", "it must be a number, not a string: remove the quotes"),
        ("enforce_eager", "False", "it must be true or false, not a string: remove the quotes"),
    ],
)
def test_engine_args_that_cannot_work_name_what_to_write(
    name: str, value: object, advice: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(generator(engine_args={name: value}))
    assert str(caught.value) == f"generators.0: engine_args.{name} is {value!r}; {advice}"


def test_engine_args_may_be_strings() -> None:
    args = {"revision": "1.0", "tool_call_parser": "hermes", "max_num_seqs": 4}
    assert parse(generator(engine_args=args)).generators[0].engine_args == args


@pytest.mark.parametrize(
    "value", ["${MODEL}", "${MODEL:-smollm2}", "models/${MODEL}", "$HOME/models/m", "$MODEL"]
)
def test_environment_variables_are_rejected(value: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(generator(model=value))
    message = str(caught.value)
    assert message.startswith(f"generators.0.model: got {value!r}; environment variables such as $")
    assert message.endswith("--set generators.0.model=…, or expand the file with `envsubst`")


def test_other_dollar_signs_are_accepted() -> None:
    tracing = {"endpoint": "http://h", "headers": {"authorization": "pa$WORD$", "x": "$5"}}
    assert parse({**generator(), "tracing": tracing}).tracing is not None


def test_configuration_is_frozen() -> None:
    config = parse(generator())
    with pytest.raises(Exception, match="frozen"):
        config.router.max_queued = 1  # type: ignore[misc]


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ({}, ["args", "at least one generator or classifier"]),
        (generator(engine="vlm"), ["generators.0.engine: got 'vlm'; allowed: 'vllm' or 'sim'"]),
        (generator(model=None), ["generators.0.model: got no value; it must be a string"]),
        (generator(max_num_seqs=4), ["max_num_seqs: no such", "arguments belong to `engine_args`"]),
        (generator(tensor_parallel_size=0), ["tensor_parallel_size", "got 0", "1"]),
        (generator(max_len=1), ["max_len: no such field", "did you mean 'max_model_len'"]),
        (generator(name="a b"), ["generators.0.name", "'a b'"]),
        (
            generator(name=1.5),
            ["generators.0.name: got 1.5", "it must be a string: put it in quotes"],
        ),
        (generator(adapters={"a b": "path"}), ["generators.0.adapters", "'a b'"]),
        (generator(adapters={"law": ""}), ["generators.0.adapters.law", "''"]),
        (generator(adapters={"g": "path"}), ["must be unique", "duplicates: g"]),
        (generator(replicas={"min": 2, "max": 1}), ["replicas", "max must be at least min (2)"]),
        (generator(replicas={"mni": 2}), ["generators.0.replicas.mni", "did you mean 'min'"]),
        (generator(kv_cache_memory_bytes="lots"), ["kv_cache_memory_bytes", "'lots'"]),
        ({"generators": [{"name": "g"}]}, ["generators.0.model", "missing"]),
        ({"generators": "g"}, ["generators", "'g'"]),
        ({**generator(), "router": {"max_queued": -1}}, ["router.max_queued", "got -1", "0"]),
        (
            {**generator(), "router": {"api_keys_sha256": ["secret"]}},
            ["keys_sha256.0", "sha256sum"],
        ),
        ({**generator(), "router": {"replicas": {"min": 0}}}, ["router", "at least 1"]),
        (generator(slo={"latency_p95_s": 1}), ["slo.latency_p95_s", "itl_p90_s, ttft_p90_s"]),
        (
            generator(gpus=1),
            ["generators.0.gpus: no such", "it belongs to `resources`"],
        ),
        ({**generator(), "http_options": {}}, ["it belongs at the top level of the file"]),
        ({"generators": [{"nam": "g"}]}, ["generators.0.nam: no such field", "'name'"]),
        (generator(replicas=2), ["generators.0.replicas: got 2; it must be a mapping"]),
        (generator(max_in_flight="8k"), ["max_in_flight: got '8k'; it must be an integer"]),
        (classifier(tasks="embed"), ["tasks: got 'embed'; it must be a list, such as [a, b]"]),
        ({**generator(), "router": {"open": "maybe"}}, ["router.open", "it must be true or false"]),
        (generator(name="my chat"), ["a model name has letters, digits"]),
        (generator(slo={"ttft_p90_s": 0}), ["slo.ttft_p90_s", "got 0"]),
        (
            {**generator(resources={"gpus": 1}, replicas={"min": 4, "max": 4})}
            | {"budget": {"gpus": 3}},
            ["budget.gpus (3)", "the 4 that replicas.min"],
        ),
        ({**generator(), "rooter": {}}, ["rooter: no such field", "did you mean 'router'"]),
        ({**generator(), "cluster": {"ray_port": 80}}, ["cluster.ray_port", "got 80", "1024"]),
        (
            {**generator(), "classifiers": [{"name": "g", "model": "m"}]},
            ["must be unique", "duplicates: g"],
        ),
        (
            {"classifiers": [{"name": name, "model": "m"} for name in ("org/m", "org--m")]},
            ["'org/m' and 'org--m' would both be 'org--m' in Ray Serve"],
        ),
        (classifier(tasks=["classify", "ner"]), ["classifiers.0.tasks.1", "'ner'", "'rerank'"]),
        (classifier(tasks=[]), ["classifiers.0.tasks", "at least 1"]),
        (
            classifier(tasks=["embed", "score", "fill-mask"]),
            ["classifiers.0", "score and fill-mask need two different models"],
        ),
        (classifier(result_cache={"max_bytes": -1}), ["result_cache.max_bytes", "got -1"]),
    ],
)
def test_errors_are_one_line_with_field_value_and_allowed_values(
    args: dict[str, Any], words: list[str]
) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(args)
    message = str(caught.value)
    assert "\n" not in message
    assert [word for word in words if word not in message] == []


def test_deprecated_names_are_accepted_and_logged(caplog: pytest.LogCaptureFixture) -> None:
    config = parse(generator(max_ongoing=8, replicas={"max": 2, "target_ongoing": 4}))
    (pool,) = config.generators
    assert (pool.max_in_flight, pool.replicas.target_in_flight) == (8, 4)
    assert "max_ongoing is deprecated; use max_in_flight" in caplog.text
    assert "target_ongoing is deprecated; use target_in_flight" in caplog.text


def test_old_and_new_name_together_are_an_error() -> None:
    with pytest.raises(ConfigError, match="set only max_in_flight"):
        parse(generator(max_ongoing=8, max_in_flight=8))


def sections() -> Iterator[type[Section]]:
    remaining: list[type[Section]] = [TandemConfig]
    while remaining:
        section = remaining.pop()
        yield section
        for field in section.model_fields.values():
            types = (field.annotation, *get_args(field.annotation))
            remaining += [t for t in types if isinstance(t, type) and issubclass(t, Section)]


def test_every_field_has_a_description() -> None:
    missing = [
        f"{section.__name__}.{name}"
        for section in sections()
        for name, field in section.model_fields.items()
        if not field.description
    ]
    assert missing == []


def test_deprecated_names_stand_for_existing_fields() -> None:
    for section in sections():
        assert section.renamed_fields.keys().isdisjoint(section.model_fields)
        assert section.model_fields.keys() >= set(section.renamed_fields.values())


def guard(**fields: Any) -> dict[str, Any]:
    """Return a configuration with one guard."""
    classifiers = [
        {"name": "labels", "model": "m", "tasks": ["classify"]},
        {"name": "entities", "model": "m", "tasks": ["token-classification"]},
        {"name": "vectors", "model": "m", "tasks": ["embed"]},
    ]
    return {
        **generator(),
        "classifiers": classifiers,
        "guards": [{"name": "g", "action": "block", **fields}],
    }


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({}, "either patterns or a classifier"),
        ({"patterns": ["card"], "classifier": "labels"}, "either patterns or a classifier"),
        ({"patterns": ["card"], "labels": ["X"]}, "only a classifier has"),
        ({"classifier": "label", "labels": ["X"]}, "did you mean 'labels'"),
        ({"classifier": "vectors", "labels": ["X"]}, "it has embed"),
        ({"classifier": "labels"}, "labels must name"),
        ({"classifier": "labels", "labels": ["X"], "action": "redact"}, "says where the data is"),
        ({"patterns": ["card"], "models": ["labels"]}, "is no generator"),
        ({"patterns": ["ssn"]}, "allowed: 'card'"),
    ],
)
def test_a_guard_that_cannot_work_is_rejected(fields: dict[str, Any], problem: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(problem)):
        parse(guard(**fields))


def test_guards_have_different_names() -> None:
    config = guard(patterns=["card"])
    assert parse(config).guards[0].on_error == "closed"
    config["guards"] *= 2
    with pytest.raises(ConfigError, match="two are named 'g'"):
        parse(config)


def test_the_guards_of_the_guide_are_valid() -> None:
    page = Path(__file__).parents[2] / "docs" / "how-to" / "guards.md"
    (block,) = re.findall(r"```yaml\n(guards:\n.*?)```", page.read_text(), re.DOTALL)
    sentiment = {"name": "sentiment", "model": "m", "tasks": ["classify"]}
    config = parse({**generator(), "classifiers": [sentiment], **yaml.safe_load(block)})
    assert [each.name for each in config.guards] == ["personal-data", "tone"]


def chosen(fallbacks: tuple[str, ...] = (), **auto: Any) -> dict[str, Any]:
    """Return a configuration of two generators with a section `auto`."""
    generators = [
        {"name": "g", "model": "m", "fallbacks": list(fallbacks)},
        {"name": "small", "model": "m"},
    ]
    classifiers = [{"name": "c", "model": "m"}, {"name": "v", "model": "m", "tasks": ["embed"]}]
    return {
        "generators": generators,
        "classifiers": classifiers,
        "auto": {"default": "small", **auto},
    }


@pytest.mark.parametrize(
    ("config", "problem"),
    [
        (chosen(("other",)), "is no generator"),
        (chosen(("g",)), "it is its own fallback"),
        (chosen(default="c"), "is no generator"),
        (chosen(rules=[{"model": "g"}]), "has no condition"),
        (chosen(rules=[{"model": "g", "labels": ["X"]}]), "need a classifier"),
        (chosen(classifier="v"), "no classifier with the task classify"),
    ],
)
def test_a_choice_of_models_that_cannot_work_is_rejected(
    config: dict[str, Any], problem: str
) -> None:
    assert parse(chosen(("small",))).auto
    with pytest.raises(ConfigError, match=re.escape(problem)):
        parse(config)


def test_auto_is_no_name_of_a_model_with_the_section() -> None:
    config = chosen()
    config["generators"][1]["aliases"] = ["auto"]
    with pytest.raises(ConfigError, match="'auto'"):
        parse(config)
