"""vLLM's FastAPI application, reduced to the routes that clients may call."""

from argparse import Namespace
from collections.abc import Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

from cluster.engines.vllm import internals
from cluster.engines.vllm.inputs import (
    add_input_tokens,
    complete_messages,
    report_validation_defects,
)
from cluster.engines.vllm.openapi import serve_document
from cluster.engines.vllm.parser_class import adapt_parsers
from cluster.engines.vllm.routes import remove_private_routes, remove_unsupported_routes
from cluster.engines.vllm.speech import Speech


async def build_app(llm: Any, args: Namespace, speech: Speech) -> Any:
    tasks = await llm.get_supported_tasks()
    app = internals.build_app(args, tasks, llm.model_config)
    # vLLM's handler of engine errors sets should_exit on its server. Without a server the handler
    # itself would fail and hide the engine's error.
    app.state.server = SimpleNamespace(should_exit=False)
    await internals.init_app_state(llm, app.state, args, tasks)
    adapt_parsers(app.state)
    describe_parsers(app.state.openai_serving_models, args)
    remove_private_routes(app)
    remove_unsupported_routes(app)
    report_validation_defects(app)
    add_input_tokens(app)
    speech.install(app)
    if (messages := getattr(app.state, "anthropic_serving_messages", None)) is not None:
        complete_messages(messages)
    serve_document(app)
    return app


def describe_parsers(models: Any, args: Namespace) -> None:
    """Show the parsers in the list of models."""
    list_models = models.show_available_models

    async def wrapper() -> Any:
        listed = await list_models()
        for card in listed.data:
            card.tool_call_parser = args.tool_call_parser
            card.reasoning_parser = args.structured_outputs_config.reasoning_parser or None
        return listed

    models.show_available_models = wrapper


def set_names(models: Any, names: Sequence[str]) -> None:
    """Serve the base model by these names; the first one is in the answers."""
    paths = models.base_model_paths  # the same list as in its registry
    paths[:] = [replace(paths[0], name=name) for name in names]
