"""How good a model is: a checkpoint in torch, or an artifact through its own runtime, on the same text and tasks."""
