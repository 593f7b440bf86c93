"""Attention calls with per-head block masks: argument checks, packing, execution, diagnosis."""
