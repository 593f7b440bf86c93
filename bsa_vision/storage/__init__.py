"""Caches in memory and on this machine, atomic writes, and a description of the machine."""
