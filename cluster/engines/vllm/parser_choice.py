"""Choice of vLLM's tool and reasoning parsers from the model's chat template and type.

The template comes first, because fine-tuned models keep the type of their base but not its format.
Each row names what distinguishes the format. The tables were read from vLLM 0.32: the module of
each parser (``vllm/tool_parsers``, ``vllm/reasoning``, ``vllm/parser``), its pages "Tool Calling"
and "Reasoning Outputs", and the model names in its Rust frontend (``rust/src/chat/src/parser``).
"""

import logging
from argparse import Namespace
from collections.abc import Iterator
from typing import Any, NamedTuple

from cluster.config import AUTO, NONE, GeneratorConfig, list_allowed
from cluster.engines.vllm import internals
from cluster.engines.vllm.tool_prompt import TOOL_PROMPT
from cluster.errors import ConfigError

logger = logging.getLogger(__name__)

FALLBACK_TOOL_PARSER = "hermes"
"""Format of models that no row describes; also that of Qwen 2.5 and 3, Hermes and SmolLM3."""
_PROBE = [{"role": "user", "content": "Hi"}]


class Row(NamedTuple):
    """Models that a parser understands: those that meet both conditions."""

    parser: str
    markers: tuple[str, ...] = ()
    """Texts that the chat template contains."""
    model_types: tuple[str, ...] = ()
    """``model_type`` is one of these; empty: any."""


class Model(NamedTuple):
    """Facts about a model that decide the parsers."""

    type: str
    """``model_type`` of its configuration."""
    template: str
    """Chat template; empty if the model has no template, or vLLM renders the prompts itself."""
    prompt: str
    """Rendered chat with one message, up to the generation; empty if there is no template."""

    def matches(self, row: Row) -> bool:
        return all(marker in self.template for marker in row.markers) and (
            not row.model_types or self.type in row.model_types
        )


_GRANITE = ("granite", "granitemoe", "granitemoeshared", "granitemoehybrid", "granite_swa")
_HUNYUAN = ("hunyuan_v1_dense", "hunyuan_v1_moe", "hunyuan")
_MIMO = ("mimo", "mimo_v2_flash", "mimo_v2")
_MINIMAX_M3 = ("minimax_m3", "minimax_m3_text", "minimax_m3_vl")
_MISTRAL = ("mistral", "mixtral", "ministral", "ministral3", "mistral3", "mistral4")
_STEP = ("step3p5", "step3p7")

TOOL_PARSERS = (
    # Types whose prompts vLLM renders without a chat template, or that share a marker
    Row("openai", model_types=("gpt_oss",)),
    Row("deepseek_v32", model_types=("deepseek_v32",)),
    Row("deepseek_v4", model_types=("deepseek_v4",)),
    Row("deepseek_v41", model_types=("deepseek_v41",)),
    Row("inkling", model_types=("inkling",)),
    Row("kimi_k3", model_types=("kimi_k3",)),
    Row("hy_v3", model_types=("hy_v3",)),
    Row("hy_v4", model_types=("hy_v4",)),
    Row("poolside_v1", model_types=("laguna",)),
    Row("mimo", ("<function=",), _MIMO),
    Row("step3p5", ("<function=",), _STEP),
    Row("minimax_m3", model_types=_MINIMAX_M3),
    Row("plamo3", model_types=("plamo3",)),
    Row("ernie45", ("<tool_call>",), ("ernie4_5_moe",)),
    Row("jamba", ("<tool_calls>",), ("jamba",)),
    Row("hunyuan_a13b", ("<tool_calls>",), _HUNYUAN),
    # Granite 4 has Hermes' tags around each call; Granite 3 writes one array.
    Row("granite4", ("</tool_call>",), _GRANITE),
    Row("granite", ("tool_call",), _GRANITE),
    # Markers of the format
    Row("deepseek_v3", ("<｜tool▁call▁begin｜>", "```json")),
    Row("deepseek_v31", ("<｜tool▁call▁begin｜>",)),
    Row("kimi_k2", ("<|tool_calls_section_begin|>",)),
    Row("minimax_m2", ("<minimax:tool_call>",)),
    Row("seed_oss", ("<seed:tool_call>",)),
    Row("longcat", ("<longcat_tool_call>",)),
    Row("dots", ("<dots_function_call>",)),
    Row("step3", ("<｜tool_call_begin｜>",)),
    Row("k2_horizon", ("<ifm|tool_calls>",)),
    Row("muse_glimmer", ("<atem:function_calls>",)),
    Row("functiongemma", ("<start_function_call>",)),
    Row("gemma4", ("<|tool_call>",)),
    Row("lfm2", ("<|tool_call_start|>",)),
    Row("internlm", ("<|action_start|>", "<|plugin|>")),
    Row("cohere_command3", ("<|START_ACTION|>",)),
    Row("apertus", ("<|tools_prefix|>",)),
    Row("olmo3", ("<function_calls>",)),
    Row("gigachat3", ("<|function_call|>",)),
    Row("minicpm5", ("<function name=",)),
    Row("glm47", ("<tool_call>", "<arg_key>")),
    Row("qwen3_coder", ("<function=", "<parameter=")),
    Row("mistral", ("[TOOL_CALLS]",)),
    # Llama 3 and 4 describe the format in their prompt.
    Row("llama3_json", ('{"name": function name, "parameters": ',)),
    Row("llama4_pythonic", model_types=("llama4",)),
)
REASONING_PARSERS = (
    Row("openai_gptoss", model_types=("gpt_oss",)),
    Row("deepseek_v3", model_types=("deepseek_v32",)),
    Row("deepseek_v4", model_types=("deepseek_v4",)),
    Row("deepseek_v41", model_types=("deepseek_v41",)),
    Row("inkling", model_types=("inkling",)),
    Row("kimi_k3", model_types=("kimi_k3",)),
    Row("hy_v3", model_types=("hy_v3",)),
    Row("hy_v4", model_types=("hy_v4",)),
    Row("minimax_m3", model_types=_MINIMAX_M3),
    Row("mimo", ("<think>",), _MIMO),
    Row("step3p5", ("<think>",), _STEP),
    Row("nemotron_v3", ("<think>", "enable_thinking"), ("nemotron_h",)),
    Row("hunyuan_a13b", ("<think>", "<answer>"), _HUNYUAN),
    Row("ernie45", ("<think>",), ("ernie4_5_moe", "ernie4_5_vl_moe")),
    Row("granite", ("Here is my thought process",), _GRANITE),
    Row("seed_oss", ("<seed:think>",)),
    Row("gemma4", ("<|channel>", "enable_thinking")),
    Row("mistral", ("[THINK]",)),
    Row("cohere_command3", ("<|START_THINKING|>",)),
    Row("kimi_k2", ("<|tool_calls_section_begin|>", "<think>")),
    Row("minimax_m2", ("<minimax:tool_call>", "<think>")),
    Row("glm47", ("<arg_key>", "<think>")),
    # DeepSeek V3.1: thinking is off unless the request sets ``thinking``.
    Row("deepseek_v3", ("<｜tool▁call▁begin｜>", "<think>", "not thinking")),
)


def tool_candidates(model: Model) -> Iterator[str]:
    """Yield tool parsers, best first; the last one suits every tokenizer."""
    if model.type in _MISTRAL and not model.template:  # mistral_common renders the prompts
        yield "mistral"
    for row in TOOL_PARSERS:
        if model.matches(row):
            yield row.parser
    yield FALLBACK_TOOL_PARSER


def reasoning_candidates(model: Model) -> Iterator[str]:
    """Yield reasoning parsers, best first, then the empty string for none."""
    for row in REASONING_PARSERS:
        if model.matches(row):
            yield row.parser
    if "<think>" in model.template:
        prompt = model.prompt.rstrip()
        if "enable_thinking" in model.template:
            # A prompt that ends the reasoning would make this parser hide the answer.
            if not prompt.endswith("</think>"):
                yield "qwen3"
        elif prompt.endswith("<think>"):
            yield "deepseek_r1"
    yield ""


def set_parsers(args: Namespace, model_config: Any, config: GeneratorConfig) -> None:
    """Set the parsers in vLLM's arguments, and a tool prompt for models without one.

    Raises:
        ConfigError: The configuration names a parser that vLLM lacks or that the model cannot use.
    """
    args.tool_call_parser = _configured(config, "tool_call_parser", internals.ToolParserManager)
    args.reasoning_parser = _configured(
        config, "reasoning_parser", internals.ReasoningParserManager
    )
    tokenizer = internals.cached_tokenizer_from_config(model_config)
    if AUTO in (args.tool_call_parser, args.reasoning_parser):
        _choose(args, tokenizer, str(model_config.hf_config.model_type))
    args.enable_auto_tool_choice = args.tool_call_parser is not None
    if error := _problem(tokenizer, args.tool_call_parser, args.reasoning_parser):
        raise ConfigError(f"generator {config.name!r}: {error}")
    logger.info(
        "generator %r: tool parser %s, reasoning parser %s",
        config.name,
        args.tool_call_parser or NONE,
        args.reasoning_parser or NONE,
    )


def _configured(config: GeneratorConfig, field: str, manager: Any) -> str | None:
    """Return ``AUTO``, a name that vLLM knows, or None for none."""
    name: str = getattr(config, field)
    if field in config.engine_args:
        logger.warning("engine_args.%s is deprecated; set the generator's %s", field, field)
        name = config.engine_args[field] or NONE
    is_off = field == "tool_call_parser" and (
        config.engine_args.get("enable_auto_tool_choice") is False
    )
    if name == NONE or is_off:
        return None
    known = sorted(manager.list_registered())
    if name != AUTO and name not in known:
        raise ConfigError(
            f"generator {config.name!r}: {field}: vLLM has no parser {name!r}; "
            f"{list_allowed(name, [AUTO, NONE, *known])}"
        )
    return name


def _choose(args: Namespace, tokenizer: Any, model_type: str) -> None:
    template = _template(args, tokenizer)
    model = Model(model_type, template, _prompt(tokenizer, template))
    if args.reasoning_parser == AUTO:
        candidates = reasoning_candidates(model)
        args.reasoning_parser = next(n for n in candidates if not _problem(tokenizer, None, n))
    if args.tool_call_parser == AUTO:
        candidates = tool_candidates(model)
        args.tool_call_parser = next(n for n in candidates if not _problem(tokenizer, n, None))
        if template and "tools" not in template:
            args.chat_template = TOOL_PROMPT + template


def _template(args: Namespace, tokenizer: Any) -> str:
    """Return the chat template for requests with tools; empty if the model has no template."""
    try:
        given = internals.load_chat_template(args.chat_template)
        return str(tokenizer.get_chat_template(given, tools=[]))
    except (AttributeError, NotImplementedError, ValueError):  # no template, or no Jinja
        return ""


def _prompt(tokenizer: Any, template: str) -> str:
    if not template:
        return ""
    try:
        return str(
            tokenizer.apply_chat_template(
                _PROBE, chat_template=template, add_generation_prompt=True, tokenize=False
            )
        )
    except Exception as error:  # templates can raise anything
        logger.warning("the chat template failed for a single user message: %s", error)
        return ""


def _problem(tokenizer: Any, tool_parser: str | None, reasoning_parser: str | None) -> str:
    """Return why vLLM cannot use the parsers, such as tokens that the tokenizer lacks; or ""."""
    try:
        internals.ParserManager.get_parser(
            tool_parser, reasoning_parser, enable_auto_tools=True, tokenizer=tokenizer
        )
    except (TypeError, ValueError) as error:
        return str(error)
    return ""
