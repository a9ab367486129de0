"""Engines, which run the models. Only this package and ``cluster.models`` load torch or vLLM."""
