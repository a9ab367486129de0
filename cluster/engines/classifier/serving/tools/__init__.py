"""Endpoints that answer from the tokenizer or the configuration, without the model."""

from typing import Any

from cluster.engines.classifier.serving.tools.base import Tool
from cluster.engines.classifier.serving.tools.info import Info
from cluster.engines.classifier.serving.tools.tokens import Decode, Detokenize, ListTokens, Tokenize

TOOLS: tuple[type[Tool[Any]], ...] = (Tokenize, ListTokens, Detokenize, Decode, Info)
