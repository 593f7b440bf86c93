"""Benchmarks of one attention call or a whole model against other implementations."""
