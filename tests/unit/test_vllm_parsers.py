"""Tool and reasoning parsers follow from the chat template and the type of the model."""

import pytest

from cluster.config import GeneratorConfig
from cluster.engines.vllm.parser_choice import Model, reasoning_candidates, tool_candidates

CHATML = "{% for m in messages %}<|im_start|>{{ m.role }}{{ m.content }}{% endfor %}"
HERMES = '{% if tools %}<tool_call>\n{"name": ..., "arguments": ...}\n</tool_call>{% endif %}'
QWEN_XML = "<tool_call>\n<function=name>\n<parameter=key>\nvalue\n</parameter>\n</function>"
DEEPSEEK = "'<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>' + tool.function.name"
LLAMA = 'Respond in the format {"name": function name, "parameters": dictionary of argument name}.'
GLM = "<tool_call>{function-name}\n<arg_key>{arg-key-1}</arg_key>"
HYBRID = "{% if enable_thinking is false %}<think>\n\n</think>{% endif %}"


def choose(model_type: str, template: str, prompt: str = "") -> tuple[str, str]:
    model = Model(model_type, template, prompt)
    return next(tool_candidates(model)), next(reasoning_candidates(model))


@pytest.mark.parametrize(
    ("family", "model_type", "template", "prompt", "tools", "reasoning"),
    [
        ("SmolLM2", "llama", CHATML, "", "hermes", ""),
        ("no chat template", "gpt2", "", "", "hermes", ""),
        ("Qwen 2.5", "qwen2", HERMES, "", "hermes", ""),
        ("Hermes 3 on Llama", "llama", HERMES, "", "hermes", ""),
        ("Qwen 3, thinks by itself", "qwen3", HERMES + HYBRID, "<|im_start|>", "hermes", "qwen3"),
        ("Qwen 3 Instruct", "qwen3", HERMES, "", "hermes", ""),
        ("QwQ", "qwen2", HERMES + "<think>\n", "<think>\n", "hermes", "deepseek_r1"),
        ("Qwen 3.5", "qwen3_5", QWEN_XML + HYBRID, "<think>\n", "qwen3_coder", "qwen3"),
        ("thinking off by default", "exaone4", HYBRID, "<think>\n\n</think>\n\n", "hermes", ""),
        ("thoughts of earlier turns only", "x", HERMES + "split('</think>')", "", "hermes", ""),
        ("Qwen 3 Coder", "qwen3_moe", QWEN_XML, "", "qwen3_coder", ""),
        ("Nemotron 3", "nemotron_h", QWEN_XML + HYBRID, "<think>", "qwen3_coder", "nemotron_v3"),
        ("Llama 3.2", "llama", LLAMA, "", "llama3_json", ""),
        ("Llama 4", "llama4", "{{ tools }}", "", "llama4_pythonic", ""),
        ("Mistral", "mistral", "[TOOL_CALLS]", "", "mistral", ""),
        ("Mistral, own tokenizer", "mistral3", "", "", "mistral", ""),
        ("Magistral", "mistral", "[TOOL_CALLS] [THINK]", "", "mistral", "mistral"),
        (
            "DeepSeek R1",
            "deepseek_v3",
            DEEPSEEK + "```json<think>",
            "<think>\n",
            "deepseek_v3",
            "deepseek_r1",
        ),
        (
            "DeepSeek V3.1",
            "deepseek_v3",
            DEEPSEEK + "{% if not thinking %}<think>",
            "</think>",
            "deepseek_v31",
            "deepseek_v3",
        ),
        ("DeepSeek V3.2", "deepseek_v32", "", "", "deepseek_v32", "deepseek_v3"),
        ("gpt-oss", "gpt_oss", "<|channel|>", "", "openai", "openai_gptoss"),
        ("Kimi K2", "kimi_k2", "<|tool_calls_section_begin|>", "", "kimi_k2", ""),
        (
            "Kimi K2 Thinking",
            "kimi_k2",
            "<|tool_calls_section_begin|><think>",
            "",
            "kimi_k2",
            "kimi_k2",
        ),
        ("GLM 4.6", "glm4_moe", GLM + HYBRID, "", "glm47", "glm47"),
        ("MiniMax M2", "minimax_m2", "<minimax:tool_call><think>", "", "minimax_m2", "minimax_m2"),
        ("Seed OSS", "seed_oss", "<seed:tool_call><seed:think>", "", "seed_oss", "seed_oss"),
        (
            "Gemma 4",
            "gemma4",
            "<|tool_call>call <|channel>thought enable_thinking",
            "",
            "gemma4",
            "gemma4",
        ),
        (
            "Granite 3.2",
            "granite",
            "<|tool_call|> Here is my thought process:",
            "",
            "granite",
            "granite",
        ),
        ("Granite 4", "granitemoehybrid", HERMES, "", "granite4", ""),
        ("LFM2", "lfm2", "<|tool_call_start|>", "", "lfm2", ""),
        ("Olmo 3", "olmo3", "<function_calls>", "", "olmo3", ""),
    ],
)
def test_the_parsers_of_a_family(
    family: str, model_type: str, template: str, prompt: str, tools: str, reasoning: str
) -> None:
    assert choose(model_type, template, prompt) == (tools, reasoning), family


def test_candidates_end_with_a_parser_for_every_tokenizer() -> None:
    model = Model("llama", "[TOOL_CALLS] <think>", "<think>")
    assert list(tool_candidates(model)) == ["mistral", "hermes"]
    assert list(reasoning_candidates(model)) == ["deepseek_r1", ""]


@pytest.mark.parametrize("value", ["auto", "none", "hermes", "granite-20b-fc"])
def test_parsers_are_configurable(value: str) -> None:
    fields = {"name": "m", "model": "m", "tool_call_parser": value, "reasoning_parser": value}
    config = GeneratorConfig.model_validate(fields)
    assert (config.tool_call_parser, config.reasoning_parser) == (value, value)
