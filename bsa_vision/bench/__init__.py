"""Benchmarks of one attention call or a whole model against other implementations.

case -> implementations -> reference -> attention, models -> report, plot
"""
