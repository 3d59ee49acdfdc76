"""Search for settings of a training on validation."""
