"""Every field of vLLM's requests is known to the guards.

Imports vLLM, which takes 15 seconds.
"""

import importlib

import pytest

from cluster.gateway.guards.prompts import PROMPT_FIELDS

pytestmark = [pytest.mark.timeout(300), pytest.mark.filterwarnings("default")]

REFUSED = {"previous_response_id", "prompt_embeds"}
"""Fields that stand for a prompt that guards cannot read."""
DOCUMENTED = {"mm_payload", "tools"}
"""Media and definitions of tools, which the guide says are not checked."""
HARMLESS = """
    add_generation_prompt add_special_tokens allowed_token_ids background bad_words cache_salt
    continue_final_message ec_transfer_params echo enable_response_messages frequency_penalty
    ignore_eos include include_reasoning include_stop_str_in_output kv_transfer_params
    length_penalty logit_bias logprob_token_ids logprobs max_completion_tokens max_output_tokens
    max_tokens max_tool_calls media_io_kwargs metadata min_p min_tokens mm_processor_kwargs model n
    output_config parallel_tool_calls presence_penalty priority prompt_cache_key prompt_logprobs
    reasoning reasoning_effort repetition_detection repetition_penalty request_id response_format
    return_mm_kwargs return_prompt_text return_token_ids return_token_offsets
    return_tokens_as_token_ids routed_experts_prompt_start seed service_tier session_id
    skip_special_tokens spaces_between_special_tokens stop stop_sequences stop_token_ids store
    stream stream_interval stream_options structured_outputs temperature text thinking
    thinking_token_budget tool_choice top_k top_logprobs top_p truncate_prompt_tokens truncation
    truncation_side use_beam_search user vllm_xargs watermarking
"""
"""Fields that no prompt contains."""
REQUESTS = {
    "/v1/chat/completions": "openai.chat_completion.protocol.ChatCompletionRequest",
    "/v1/completions": "openai.completion.protocol.CompletionRequest",
    "/v1/responses": "openai.responses.protocol.ResponsesRequest",
    "/v1/messages": "anthropic.protocol.AnthropicMessagesRequest",
}


@pytest.mark.parametrize("path", PROMPT_FIELDS)
def test_fields_are_checked_refused_or_harmless(path: str) -> None:
    module, _, name = f"vllm.entrypoints.{REQUESTS[path]}".rpartition(".")
    fields = getattr(importlib.import_module(module), name).model_fields
    names = {each for key, info in fields.items() for each in (key, info.alias or key)}
    checked, others = set(PROMPT_FIELDS[path]), {*HARMLESS.split()} | REFUSED | DOCUMENTED
    assert checked <= names
    assert not checked & others
    # Decide whether guards must check these, and extend PROMPT_FIELDS or a list above.
    assert not names - checked - others
