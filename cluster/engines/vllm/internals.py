"""Non-public names of vLLM that Tandem uses, imported on first access.

``internals.AsyncLLM`` imports ``vllm.v1.engine.async_llm`` and returns ``AsyncLLM``. Read from vLLM
0.32. After an upgrade, ``tests/cluster/test_vllm_internals.py`` names what is missing.
"""

import pkgutil
from typing import Any

_REPLIES = {
    "anthropic.protocol": (
        "AnthropicCountTokensResponse",
        "AnthropicMessagesResponse",
        "AnthropicStreamEvent",
    ),
    "generate.generative_scoring.serving": ("GenerativeScoringResponse",),
    "generate.structured_decisions.protocol": ("StructuredDecisionResponse",),
    "openai.chat_completion.protocol": (
        "ChatCompletionResponse",
        "ChatCompletionStreamResponse",
    ),
    "openai.completion.protocol": (
        "CompletionResponse",
        "CompletionStreamResponse",
    ),
    "openai.responses.protocol": (
        "ResponsesResponse",
        "StreamingResponsesResponse",
    ),
    "pooling.classify.protocol": ("ClassificationResponse",),
    "pooling.embed.protocol": (
        "CohereEmbedResponse",
        "EmbeddingResponse",
    ),
    "pooling.pooling.protocol": ("PoolingResponse",),
    "pooling.scoring.protocol": (
        "RerankResponse",
        "ScoreResponse",
    ),
    "scale_out.token_in_token_out.protocol": (
        "DerenderChatStreamResponse",
        "DerenderCompletionStreamResponse",
        "GenerateResponse",
        "GenerateStreamResponse",
    ),
    "serve.engine.protocol": (
        "ErrorResponse",
        "ModelList",
    ),
    "serve.tokenize.protocol": (
        "DetokenizeResponse",
        "TokenizeResponse",
    ),
    "speech_to_text.transcription.protocol": (
        "TranscriptionRequest",
        "TranscriptionResponse",
        "TranscriptionResponseVariant",
        "TranscriptionResponseVerbose",
        "TranscriptionStreamResponse",
    ),
    "speech_to_text.translation.protocol": (
        "TranslationRequest",
        "TranslationResponse",
        "TranslationResponseVariant",
        "TranslationResponseVerbose",
        "TranslationStreamResponse",
    ),
}
"""Types of answers, for the OpenAPI document, and forms, by module below ``vllm.entrypoints``."""

NAMES = {
    # Start of the engine
    "engine_utils": "vllm.v1.engine.utils",  # get_mp_context
    "AsyncEngineArgs": "vllm.engine.arg_utils:AsyncEngineArgs",  # arguments -> VllmConfig
    "AsyncLLM": "vllm.v1.engine.async_llm:AsyncLLM",
    "EngineCoreProc": "vllm.v1.engine.core:EngineCoreProc",  # the engine's process
    "EngineDeadError": "vllm.v1.engine.exceptions:EngineDeadError",  # raised by check_health
    "FlexibleArgumentParser": "vllm.utils.argparse_utils:FlexibleArgumentParser",
    "KVEventsConfig": "vllm.config:KVEventsConfig",
    "LoRAModulePath": "vllm.entrypoints.openai.models.protocol:LoRAModulePath",
    "ParserManager": "vllm.parser:ParserManager",  # checks a parser against a tokenizer
    "ReasoningParserManager": "vllm.reasoning:ReasoningParserManager",  # names of the parsers
    "ToolParserManager": "vllm.tool_parsers:ToolParserManager",
    "cached_tokenizer_from_config": "vllm.tokenizers:cached_tokenizer_from_config",
    "current_platform": "vllm.platforms:current_platform",  # is_cpu
    "load_chat_template": "vllm.renderers.chat_utils:load_chat_template",
    "make_arg_parser": "vllm.entrypoints.launchers.cli_args:make_arg_parser",  # the defaults
    # Application
    "DeltaMessage": "vllm.entrypoints.generate.base.protocol:DeltaMessage",
    "ToolStrictLevel": "vllm.tool_parsers.tool_strict_level:ToolStrictLevel",
    "ImageMediaIO": "vllm.multimodal.media.image:ImageMediaIO",
    "MEDIA_CONNECTOR_REGISTRY": "vllm.multimodal.media:MEDIA_CONNECTOR_REGISTRY",
    "MediaConnector": "vllm.multimodal.media:MediaConnector",  # loads images, audio and video
    "VideoMediaIO": "vllm.multimodal.media.video:VideoMediaIO",
    "VideoBackend": "vllm.multimodal.video:VideoBackend",  # a loader; the default one
    "multimodal_image": "vllm.multimodal.image",  # ALLOWED_IMAGE_FORMATS
    "build_app": "vllm.entrypoints.launchers.app:build_app",
    "init_app_state": "vllm.entrypoints.launchers.api_server.app_state:init_app_state",
    "ResponsesRequest": "vllm.entrypoints.openai.responses.protocol:ResponsesRequest",
    "ServingRender": "vllm.entrypoints.scale_out.render.serving:ServingRender",
    "VLLMValidationError": "vllm.exceptions:VLLMValidationError",  # becomes a 400
    "split_audio": "vllm.multimodal.audio:split_audio",
    "with_cancellation": "vllm.entrypoints.serve.utils.api_utils:with_cancellation",
    # Statistics
    "RayPrometheusStatLogger": "vllm.v1.metrics.ray_wrappers:RayPrometheusStatLogger",
    "StatLoggerBase": "vllm.v1.metrics.loggers:StatLoggerBase",
    "envs": "vllm.envs",  # VLLM_LOG_STATS_INTERVAL
    # Hand-over of answers
    "AsyncScheduler": "vllm.v1.core.sched.async_scheduler:AsyncScheduler",
    "EngineCoreOutput": "vllm.v1.engine:EngineCoreOutput",
    "FinishReason": "vllm.v1.engine:FinishReason",
    "IterationStats": "vllm.v1.metrics.stats:IterationStats",
    "Logprob": "vllm.logprobs:Logprob",
    "RequestStatus": "vllm.v1.request:RequestStatus",
    "Scheduler": "vllm.v1.core.sched.scheduler:Scheduler",
    "gpu_model_runner": "vllm.v1.worker.gpu_model_runner",  # CachedRequestState
    # CPU worker
    "ParallelLMHead": "vllm.model_executor.layers.vocab_parallel_embedding:ParallelLMHead",
    "layer_utils": "vllm.model_executor.layers.utils",  # dispatch_cpu_unquantized_gemm
    "CPUWorker": "vllm.v1.worker.cpu_worker:CPUWorker",  # its import registers torch.ops._C
    "topk_topp_sampler": "vllm.v1.sample.ops.topk_topp_sampler",  # apply_top_k_top_p, …_pytorch
    "ir": "vllm.ir",  # ops.rms_norm, ops.fused_add_rms_norm
    # Layers that Tandem computes itself on CPUs
    "Attention": "vllm.model_executor.layers.attention:Attention",
    "CPUAttentionBackendImpl": "vllm.v1.attention.backends.cpu_attn:CPUAttentionBackendImpl",
    "LlamaAttention": "vllm.model_executor.models.llama:LlamaAttention",
    "LlamaDecoderLayer": "vllm.model_executor.models.llama:LlamaDecoderLayer",
    "LlamaMLP": "vllm.model_executor.models.llama:LlamaMLP",
    "LlamaModel": "vllm.model_executor.models.llama:LlamaModel",
    "RMSNorm": "vllm.model_executor.layers.layernorm:RMSNorm",
    "RotaryEmbedding": "vllm.model_executor.layers.rotary_embedding.base:RotaryEmbedding",
    "SiluAndMul": "vllm.model_executor.layers.activation:SiluAndMul",
    "UnquantizedLinearMethod": "vllm.model_executor.layers.linear:UnquantizedLinearMethod",
    "get_forward_context": "vllm.forward_context:get_forward_context",
    # Types of objects that vLLM hands out; only their attributes are used
    "AllBlocksCleared": "vllm.distributed.kv_events:AllBlocksCleared",
    "BackgroundResources": "vllm.v1.engine.core_client:BackgroundResources",
    "BlockRemoved": "vllm.distributed.kv_events:BlockRemoved",
    "BlockStored": "vllm.distributed.kv_events:BlockStored",
    "CacheConfig": "vllm.config:CacheConfig",
    "CompletionOutput": "vllm.outputs:CompletionOutput",
    "CoreEngineProcManager": "vllm.v1.engine.utils:CoreEngineProcManager",
    "DPLBAsyncMPClient": "vllm.v1.engine.core_client:DPLBAsyncMPClient",
    "EventBatch": "vllm.distributed.kv_events:EventBatch",
    "LoRARequest": "vllm.lora.request:LoRARequest",
    "MPClient": "vllm.v1.engine.core_client:MPClient",
    "OnlineRenderer": "vllm.renderers.online_renderer:OnlineRenderer",
    "OpenAIServingChat": "vllm.entrypoints.openai.chat_completion.serving:OpenAIServingChat",
    "OpenAIServingModels": "vllm.entrypoints.openai.models.serving:OpenAIServingModels",
    "OpenAIServingResponses": "vllm.entrypoints.openai.responses.serving:OpenAIServingResponses",
    "OutputProcessor": "vllm.v1.engine.output_processor:OutputProcessor",
    "ParentRequest": "vllm.v1.engine.parallel_sampling:ParentRequest",
    "Parser": "vllm.parser.abstract_parser:Parser",
    "PoolingRequestOutput": "vllm.outputs:PoolingRequestOutput",
    "RequestOutput": "vllm.outputs:RequestOutput",
    "RequestState": "vllm.v1.engine.output_processor:RequestState",
    "RequestStateStats": "vllm.v1.metrics.stats:RequestStateStats",
    "SchedulerStats": "vllm.v1.metrics.stats:SchedulerStats",
    "StructuredOutputsConfig": "vllm.config:StructuredOutputsConfig",
    "VllmConfig": "vllm.config:VllmConfig",
    # Answers, for the OpenAPI document. vLLM's union of stream events lacks some that it sends.
    "ResponseStreamEvent": "openai.types.responses:ResponseStreamEvent",
    **{
        name: f"vllm.entrypoints.{module}:{name}"
        for module, names in _REPLIES.items()
        for name in names
    },
}
"""Definition of each name, in the form of ``pkgutil.resolve_name``."""

ATTRIBUTES = {
    "AsyncEngineArgs": ("from_cli_args", "create_engine_config", "create_model_config"),
    "AsyncLLM": (
        *(
            "from_vllm_config",
            "generate",
            "encode",
            "abort",
            "check_health",
            "shutdown",
            "do_log_stats",
            "add_lora",
        ),
        *("get_num_unfinished_requests", "get_supported_tasks"),
        *("tokenizer", "vllm_config", "model_config", "engine_core", "output_processor"),
    ),
    "BackgroundResources": ("ctx", "engine_manager"),
    "BlockRemoved": ("block_hashes", "medium", "group_idx"),
    "BlockStored": (
        *("block_hashes", "parent_block_hash", "token_ids", "block_size"),
        *("medium", "lora_name", "extra_keys", "group_idx"),
    ),
    "CacheConfig": ("block_size", "enable_prefix_caching"),
    "CompletionOutput": ("index", "token_ids", "logprobs", "finish_reason", "stop_reason"),
    "CoreEngineProcManager": ("processes",),
    "DPLBAsyncMPClient": ("engine_inflight", "core_engines"),
    # And ``input_queue``, which its decorated ``__init__`` sets.
    "EngineCoreProc": ("_process_input_queue", "_handle_client_request", "has_work"),
    "EventBatch": ("ts", "events"),
    "KVEventsConfig": ("enable_kv_cache_events", "endpoint"),
    "LoRARequest": ("lora_name",),
    "MPClient": ("resources", "add_request_async"),
    "MEDIA_CONNECTOR_REGISTRY": ("register",),
    "MediaConnector": (
        *("load_from_url", "load_from_url_async"),
        *("allowed_local_media_path", "allowed_media_domains"),
    ),
    "OutputProcessor": ("request_states", "parent_requests", "process_outputs", "log_stats"),
    "ParentRequest": ("child_requests",),
    "OnlineRenderer": ("parser",),
    "OpenAIServingModels": (
        "show_available_models",
        "base_model_paths",
        "lora_requests",
        "lora_id_counter",
    ),
    "OpenAIServingChat": ("parser_cls",),
    "OpenAIServingResponses": ("parser",),
    "Parser": ("adjust_request", "parse_delta", "reasoning_parser", "tool_strict_level"),
    "ParserManager": ("get_parser",),
    "PoolingRequestOutput": ("prompt_token_ids", "num_cached_tokens", "finished"),
    "ReasoningParserManager": ("list_registered",),
    "RequestState": (
        *("prompt_len", "num_cached_tokens", "num_cache_creation_tokens", "is_prefilling"),
        *("output_kind", "detokenizer", "logprobs_processor", "queue"),
    ),
    "RequestOutput": (
        *("prompt_token_ids", "num_cached_tokens", "num_cache_creation_tokens"),
        *("outputs", "metrics", "prompt_logprobs"),
    ),
    "RequestStateStats": (
        *("num_generation_tokens", "first_token_latency", "first_token_ts", "last_token_ts"),
    ),
    "SchedulerStats": ("num_running_reqs", "num_waiting_reqs", "kv_cache_usage"),
    "ServingRender": ("render_responses_request",),
    "StatLoggerBase": ("record", "log_engine_initialized"),
    "StructuredOutputsConfig": ("backend", "disable_any_whitespace"),
    "ToolParserManager": ("list_registered",),
    "ToolStrictLevel": ("PARAMETER",),
    "VideoBackend": ("compute_frames_index_to_sample",),
    "VideoMediaIO": ("num_frames", "video_loader", "load_base64", "load_bytes"),
    "VllmConfig": ("cache_config", "model_config", "structured_outputs_config"),
}
"""Attributes that Tandem uses, by the name of their class."""

APP_MODULES = (
    "vllm.entrypoints.launchers.app",
    "vllm.entrypoints.launchers.api_server.app_state",
    "vllm.entrypoints.generate.api_router",
    "vllm.entrypoints.scale_out.factories",
    "vllm.entrypoints.serve",
)
"""Modules that the application imports; loaded early, while the engine's process starts."""

ENGINE_MODULES = (
    *APP_MODULES,  # while the engine's process starts, importing them would be faster but unsafe
    "vllm.v1.engine.core",
    "vllm.v1.worker.cpu_worker",
    "vllm.model_executor.models.llama",  # used by most other decoders
    "vllm.v1.attention.backends.cpu_attn",
)
"""Modules that the engine's process imports on CPUs; loaded before it is forked."""


def __getattr__(name: str) -> Any:
    if name not in NAMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return pkgutil.resolve_name(NAMES[name])
