"""What is kept: in memory (`memory_cache`), on this machine (`machine_cache`), in files (`atomic_write`)."""
