"""Models: our own encoder, models by name, their features and images."""
