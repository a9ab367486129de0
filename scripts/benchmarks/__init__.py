"""Benchmarks: Tandem beside its peers, in interleaved rounds, on one machine, in one run.

A benchmark is a module in ``__main__.BENCHMARKS`` with

- a docstring whose first line is its help;
- ``add_arguments(parser)``: its own options, beside ``--rounds``, ``--quick`` and ``--json``;
- ``run(args) -> Report``: measures; ``args`` is the parsed command line. A report's ``keys`` are
  numbers by name, each with its rounds (``rounds.Summary``); its tables go to the screen.

A peer is a context manager in ``targets`` that yields an ``Endpoint``; whatever it starts carries
the mark of its ``Home`` (``targets.home``), and has ended when the ``with`` block has.
A benchmark prints and asserts nothing about time.
"""
