"""vLLM as an engine: ``AsyncLLM`` and vLLM's own OpenAI application, in the replica's process.

``engine`` implements ``Engine``; ``launcher`` starts and stops vLLM's processes with the settings
from ``arguments`` and ``environment``; ``app`` builds the application. ``parser_choice``,
``parser_class`` and ``tool_prompt`` make tools work for every model. ``requests``, ``kv_events``
and ``disconnect`` connect vLLM to usage, prefix routing and cancellation. ``cpu_worker`` runs in
vLLM's own processes. Non-public names of vLLM come from ``internals`` alone.
"""
