"""Swap attention modules of a model, and restore them."""
