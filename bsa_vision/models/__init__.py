"""Image encoder to train, models by name, feature extraction and image loading."""
