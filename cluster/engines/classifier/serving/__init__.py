"""Requests to a classifier, from HTTP to the threads that tokenize and compute, and back.

A request passes ``app → tasks → cache → service → tokenizer_stage → queue → runner`` and its result
returns the same way. ``schema`` checks bodies, ``insight`` adds explanations and counts drift.
"""
