"""Time, memory, and the latency of attention on this machine."""
