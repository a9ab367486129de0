"""Encoder networks: loading, tokenizing, and forward passes in the configured precision.

Imports run ``types → template → tokenizer → windows`` for texts and ``types, outputs → packed →
padded → agreement → build → load`` for networks.
"""
