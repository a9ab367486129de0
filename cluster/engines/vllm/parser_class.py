"""Adaptation of the parser class that vLLM composes from its tool and reasoning parsers.

- Demanded tool calls (``required``, or a named function) follow the schema of their function. vLLM
  allows any JSON as arguments unless the client sets ``strict``, which few clients do. Calls of
  choice ``auto`` stay free: compiling a schema can take seconds, and most requests need no call.
- Streams without tools and reasoning are not parsed. vLLM would collect their tokens, which costs
  4 to 40 µs for each token of an answer of 200 to 8,000 tokens (AMD EPYC, Zen 4).
"""

import json
from typing import Any

from cluster.engines.vllm import internals

_FREE_CHOICES = (None, "auto", "none")
_MAX_WHITESPACE = 1  # small models otherwise fill arguments with whitespace until ``max_tokens``


def adapt_parsers(state: Any) -> None:
    """Adapt the parser classes of vLLM's services, which are attributes of ``state``."""
    for name, attribute in (
        ("online_renderer", "parser"),
        ("openai_serving_chat", "parser_cls"),
        ("anthropic_serving_messages", "parser_cls"),
        ("openai_serving_responses", "parser"),
    ):
        service = getattr(state, name, None)
        parser = getattr(service, attribute, None)
        if parser is not None:
            setattr(service, attribute, adapt_parser(parser))


def adapt_parser(parser: Any) -> Any:
    """Return a subclass of one of vLLM's parser classes."""

    class AdaptedParser(parser):  # type: ignore[misc]
        def adjust_request(self, request: Any) -> Any:
            if not request.tools:
                return super().adjust_request(request)
            if request.tool_choice not in _FREE_CHOICES:
                self.tool_strict_level = internals.ToolStrictLevel.PARAMETER
            request = super().adjust_request(request)
            outputs = request.structured_outputs
            if outputs is not None and outputs.structural_tag:
                outputs.structural_tag = _limit_whitespace(outputs.structural_tag)
            return request

        def parse_delta(
            self, delta_text: str, delta_token_ids: Any, request: Any, *args: Any, **kwargs: Any
        ) -> Any:
            if self.reasoning_parser is None and not request.tools:
                return internals.DeltaMessage(content=delta_text)
            return super().parse_delta(delta_text, delta_token_ids, request, *args, **kwargs)

    return AdaptedParser


def _limit_whitespace(structural_tag: str) -> str:
    def limit(node: dict[str, Any]) -> dict[str, Any]:
        is_json = node.get("type") == "json_schema" and node.get("style") == "json"
        if is_json and node.get("max_whitespace_cnt", 0) is None:
            node["max_whitespace_cnt"] = _MAX_WHITESPACE
        return node

    return json.dumps(json.loads(structural_tag, object_hook=limit))
