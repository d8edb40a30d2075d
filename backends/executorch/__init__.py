"""ExecuTorch, through its Python bindings."""
