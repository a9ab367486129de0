"""Encoder networks: loading, tokenizing, and forward passes in the configured precision.

Imports run ``types → template → tokenizer → windows`` for texts and ``types → pooling, scores →
padded, packed → precision → build → load`` for networks.
"""
