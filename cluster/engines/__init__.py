"""Engines, which run the models. Only this package imports vLLM."""
