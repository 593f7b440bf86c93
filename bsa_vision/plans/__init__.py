"""Which head uses which pattern, and what follows from it."""
