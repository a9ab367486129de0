"""A simulated engine: vLLM's HTTP surface and scheduling without a model.

tokenizer  text and token ids, both ways, without a vocabulary file
blocks     the KV blocks and their prefix cache
adapters   which LoRA adapters are loaded
scheduler  continuous batching as a pure model: what a step does and how long it takes
generation one request's sequences, and the mailbox their tokens come through
engine     runs the scheduler in an event loop; implements ``Engine``
parse      request bodies: what vLLM takes, and how it refuses the rest
prompts    from a body to prompts that fit the model
wire       answers as vLLM writes them; ``chunks`` for OpenAI's streams
http       one request and its answer over ASGI
openai     the endpoints; also ``anthropic`` and ``responses``
app        the ASGI application over all of it
"""

from cluster.engines.sim.engine import SimEngine

__all__ = ["SimEngine"]
