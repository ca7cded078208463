"""Benchmarks: what a hypergradient costs, measured side by side."""
