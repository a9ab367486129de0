"""The routes of vLLM that clients may call."""

from collections.abc import Mapping
from typing import Any, NamedTuple


class PublicRoute(NamedTuple):
    """Handler, summary and answers of a route of vLLM."""

    handler: str
    """Attribute of the application's state; None there if the model does not support the route."""
    summary: str
    """One line for the OpenAPI document."""
    reply: str | None
    """Names in ``internals`` of the types of the JSON answer, separated by ``|``; None if vLLM
    declares it."""
    event: str | None = None
    """The same of a stream's events; None if nothing is streamed."""


_CHAT, _COMPLETION, _RESPONSES = "ChatCompletionResponse", "CompletionResponse", "ResponsesResponse"
_RESPONSES_EVENT = "StreamingResponsesResponse|ResponseStreamEvent"
_EMBED = PublicRoute("serving_embedding", "Embed texts.", "EmbeddingResponse")
_SCORE = PublicRoute("serving_scores", "Score pairs of texts.", "ScoreResponse")
_RERANK = PublicRoute(
    "serving_scores", "Sort documents by their relevance to a query.", "RerankResponse"
)

PUBLIC_ROUTES: Mapping[tuple[str, str], PublicRoute] = {
    ("GET", "/v1/models"): PublicRoute("openai_serving_models", "List the models.", "ModelList"),
    ("GET", "/v1/responses/{response_id}"): PublicRoute(
        "openai_serving_responses",
        "Return a stored response.",
        _RESPONSES,
        _RESPONSES_EVENT,
    ),
    ("POST", "/classify"): PublicRoute(
        "serving_classification", "Classify one or more texts.", "ClassificationResponse"
    ),
    ("POST", "/detokenize"): PublicRoute(
        "serving_tokenization", "Return the text of tokens.", "DetokenizeResponse"
    ),
    ("POST", "/generative_scoring"): PublicRoute(
        "serving_generative_scoring",
        "Score items by the probability of the tokens that would follow.",
        "GenerativeScoringResponse",
    ),
    ("POST", "/inference/v1/generate"): PublicRoute(
        "serving_tokens",
        "Generate from token ids.",
        "GenerateResponse",
        "GenerateStreamResponse|ErrorResponse",
    ),
    ("POST", "/pooling"): PublicRoute(
        "serving_pooling", "Return the model's pooled output.", "PoolingResponse"
    ),
    ("POST", "/rerank"): _RERANK,
    ("POST", "/score"): _SCORE,
    ("POST", "/tokenize"): PublicRoute(
        "serving_tokenization", "Return the tokens of a text or a chat.", "TokenizeResponse"
    ),
    ("POST", "/v1/audio/transcriptions"): PublicRoute(
        "openai_serving_transcription",
        "Transcribe an audio file.",
        "TranscriptionResponseVariant",
        "TranscriptionStreamResponse|ErrorResponse",
    ),
    ("POST", "/v1/audio/translations"): PublicRoute(
        "openai_serving_translation",
        "Translate an audio file into English text.",
        "TranslationResponseVariant",
        "TranslationStreamResponse|ErrorResponse",
    ),
    ("POST", "/v1/chat/completions"): PublicRoute(
        "openai_serving_chat",
        "Generate the next message of a chat (OpenAI).",
        _CHAT,
        "ChatCompletionStreamResponse|ErrorResponse",
    ),
    ("POST", "/v1/chat/completions/batch"): PublicRoute(
        "openai_serving_chat_batch", "Generate the next message of several chats.", _CHAT
    ),
    ("POST", "/v1/chat/completions/derender"): PublicRoute(
        "serving_derender",
        "Make a chat answer from generated tokens.",
        "ChatCompletionResponse|DerenderChatStreamResponse",
    ),
    ("POST", "/v1/chat/completions/render"): PublicRoute(
        "serving_render", "Return the tokens of a chat request.", None
    ),
    ("POST", "/v1/completions"): PublicRoute(
        "openai_serving_completion",
        "Complete a text (OpenAI).",
        _COMPLETION,
        "CompletionStreamResponse|ErrorResponse",
    ),
    ("POST", "/v1/completions/derender"): PublicRoute(
        "serving_derender",
        "Make a completion from generated tokens.",
        "CompletionResponse|DerenderCompletionStreamResponse",
    ),
    ("POST", "/v1/completions/render"): PublicRoute(
        "serving_render", "Return the tokens of a completion request.", None
    ),
    ("POST", "/v1/embeddings"): _EMBED,
    ("POST", "/v1/messages"): PublicRoute(
        "anthropic_serving_messages",
        "Generate the next message of a chat (Anthropic).",
        "AnthropicMessagesResponse",
        "AnthropicStreamEvent",
    ),
    ("POST", "/v1/messages/count_tokens"): PublicRoute(
        "anthropic_serving_messages",
        "Count the tokens of a chat (Anthropic).",
        "AnthropicCountTokensResponse",
    ),
    ("POST", "/v1/messages/render"): PublicRoute(
        "serving_render", "Return the tokens of a messages request.", None
    ),
    ("POST", "/v1/rerank"): _RERANK,
    ("POST", "/v1/responses"): PublicRoute(
        "openai_serving_responses",
        "Generate a response (OpenAI).",
        _RESPONSES,
        _RESPONSES_EVENT,
    ),
    ("POST", "/v1/responses/render"): PublicRoute(
        "serving_render", "Return the tokens of a responses request.", None
    ),
    ("POST", "/v1/responses/{response_id}/cancel"): PublicRoute(
        "openai_serving_responses", "Cancel a response in the background.", _RESPONSES
    ),
    ("POST", "/v1/score"): _SCORE,
    ("POST", "/v1/systemone"): PublicRoute(
        "serving_structured_decisions",
        "Answer questions with fixed options.",
        "StructuredDecisionResponse",
    ),
    ("POST", "/v2/embed"): PublicRoute(
        "serving_embedding", "Embed texts or images (Cohere).", "CohereEmbedResponse"
    ),
    ("POST", "/v2/rerank"): _RERANK,
}
"""Public routes of vLLM 0.32, by method and path template.

``tests/cluster/test_vllm_routes.py`` lists the others, and names those of a new release. They
monitor vLLM, dispatch to any other path, abort requests of other clients, or change the engine.
"""

INPUT_TOKENS_PATH = "/v1/responses/input_tokens"
ROUTES: Mapping[tuple[str, str], PublicRoute] = {
    **PUBLIC_ROUTES,
    ("POST", INPUT_TOKENS_PATH): PublicRoute(
        "openai_serving_responses", "Count the input tokens of a response (OpenAI).", None
    ),
}
"""``PUBLIC_ROUTES``, and those that ``cluster.engines.vllm.inputs`` adds."""

OPENAPI_PATH = "/openapi.json"
"""Path of the document; for the router only, which merges the documents of all engines."""


def remove_private_routes(app: Any) -> None:
    """Leave only ``PUBLIC_ROUTES`` in vLLM's application."""
    app.router.routes[:] = [route for route in app.router.routes if _is_public(route)]


def remove_unsupported_routes(app: Any) -> None:
    """Remove public routes that would only answer that the model does not support them."""
    app.router.routes[:] = [route for route in app.router.routes if _is_supported(app, route)]


def public_routes(app: Any) -> tuple[str, ...]:
    paths = dict.fromkeys(route.path for route in app.router.routes)
    return tuple(path for path in paths if path != OPENAPI_PATH)


def _is_public(route: Any) -> bool:
    methods = getattr(route, "methods", None) or ()  # none: websockets and mounts
    return bool(methods) and all((method, route.path) in PUBLIC_ROUTES for method in methods)


def _is_supported(app: Any, route: Any) -> bool:
    # vLLM registers stubs for what its arguments disable, and hides them from its own document.
    return bool(route.include_in_schema) and all(
        getattr(app.state, PUBLIC_ROUTES[method, route.path].handler, None) is not None
        for method in route.methods
    )
