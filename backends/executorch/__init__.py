"""ExecuTorch through its Python bindings, or its runners on a phone."""
