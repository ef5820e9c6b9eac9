"""Benchmarks and studies whose numbers the docs quote."""
