"""What the plug-in costs: ``python -m benchmarks NAME [options] [--json]``; docs/performance.md keeps the figures."""
