"""Engines: the things that compute. Only this package imports vllm, torch or transformers."""
