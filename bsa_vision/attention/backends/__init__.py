"""Implementations of block-sparse attention, and the choice between them (`select`)."""
