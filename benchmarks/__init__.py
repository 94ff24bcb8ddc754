"""Measure the plug-in: ``python -m benchmarks NAME [options] [--json]``.

The figures stand in docs/internals/performance.md.
"""
