"""What times a model on a device: our agent in its Python, or a program built for a phone."""
