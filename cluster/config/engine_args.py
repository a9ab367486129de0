"""Checks of a generator's ``engine_args`` that need no vLLM."""

import re
from collections.abc import Mapping
from typing import Any

_FIELDS: Mapping[str, str] = {
    "model": "the generator's `model`",
    "served_model_name": "the generator's `name` and `aliases`",
    "enable_lora": "the generator's `adapters`",
    "lora_modules": "the generator's `adapters`",
    "tensor_parallel_size": "the generator's `tensor_parallel_size`",
    "pipeline_parallel_size": "the generator's `pipeline_parallel_size`",
    # Only for vLLM's own launcher: the replica would wait for nodes that nothing starts.
    "nnodes": "the generator's `pipeline_parallel_size`",
    "node_rank": "the generator's `pipeline_parallel_size`",
    "master_addr": "the generator's `pipeline_parallel_size`",
    "master_port": "the generator's `pipeline_parallel_size`",
    "dtype": "the generator's `dtype`",
    "quantization": "the generator's `quantization`",
    "max_model_len": "the generator's `max_model_len`",
    "kv_cache_memory_bytes": "the generator's `kv_cache_memory_bytes`",
    # Its engines would use GPUs that the replica has not reserved.
    "data_parallel_size": "the generator's `replicas`, each of which is a data-parallel rank,",
    "data_parallel_size_local": "the generator's `replicas`",
    # Arguments of vLLM's own HTTP server, which does not run.
    "host": "`http_options.host`",
    "port": "`http_options.port`",
    "root_path": "the application's `route_prefix`",
    "api_key": "keys with `tandem keys add`",
}
"""vLLM's argument, and what to set instead."""

_NUMBER = re.compile(r"[+-]?\d+(\.\d*)?([eE][+-]?\d+)?")
_NUMBERS_AS_TEXT = ("revision", "code_revision", "tokenizer_revision", "fingerprint_value")


def check_engine_args(engine_args: Mapping[str, Any]) -> None:
    """Check names and quoted values.

    Raises:
        ValueError: another field sets the argument, its name is not a Python name, or its value is
            a number or a truth value in quotes.
    """
    for given, value in engine_args.items():
        name = given.lstrip("-").replace("-", "_")
        where = f"engine_args.{given} is {value!r};"
        if name in _FIELDS:
            raise ValueError(f"{where} set {_FIELDS[name]} instead")
        if name != given:
            raise ValueError(f"{where} write the Python name, `{name}`")
        if not isinstance(value, str) or name in _NUMBERS_AS_TEXT:
            continue
        if _NUMBER.fullmatch(value):
            raise ValueError(f"{where} it must be a number, not a string: remove the quotes")
        if value.lower() in ("true", "false"):
            raise ValueError(f"{where} it must be true or false, not a string: remove the quotes")
