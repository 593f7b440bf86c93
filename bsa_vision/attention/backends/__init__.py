"""The implementations of block-sparse attention, and the choice among them (`select`)."""
