"""Time, memory, and what attention costs on this machine."""
