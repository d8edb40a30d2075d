"""Recovery by distillation: the pruned model is trained to predict what the dense model does.

`options` says how, `lessons` what it is trained on (kept text, or a stream that `stream` packs), `trainable` which
weights are trained and how fast, `optimizer` how their states are kept, and `train` does it.
"""
