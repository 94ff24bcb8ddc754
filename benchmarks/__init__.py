"""What the plug-in costs: ``python -m benchmarks NAME [options] [--json]``; docs/internals/performance.md keeps the figures."""
