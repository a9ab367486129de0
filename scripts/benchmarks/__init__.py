"""Benchmarks of Tandem and its peers, side by side on one machine, in interleaved rounds.

A benchmark is a module in ``__main__.BENCHMARKS`` with

- a docstring whose first line is its help text;
- ``add_arguments(parser)``, which adds options besides ``--rounds``, ``--quick`` and ``--json``;
- ``run(args) -> Report``, which measures. ``args`` is the parsed command line. ``Report.keys`` are
  the numbers that are compared between runs; its tables are printed.

A peer is a context manager in ``targets`` that yields a ``RunningTarget``. Every process it starts
carries the mark of its ``Home`` (``targets.home``) and has ended when the ``with`` block exits.
Benchmarks print ratios; they never fail because something was slow.
"""
