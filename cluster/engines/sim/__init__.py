"""Simulated engine: vLLM's HTTP API and scheduling without a model.

tokenizer   text to token ids and back, without a vocabulary file
blocks      KV blocks and their prefix cache
scheduler   continuous batching as a pure model: work and duration of each step
adapters    loaded LoRA adapters
generation  sequences of one HTTP request, and the queue of their tokens
engine      event loop around the scheduler; implements ``Engine``
parse       validation of request bodies, with vLLM's error responses
prompts     prompts and token limits from a validated body
wire        response bodies as vLLM writes them; ``chunks`` for OpenAI's streams
http        one request and its response over ASGI
openai      endpoints; also ``anthropic`` and ``responses``
app         ASGI application
"""

from cluster.engines.sim.engine import SimEngine

__all__ = ["SimEngine"]
