"""What no model, machine or file has: beyond it a number is a slip, or damage, and is not computed with."""

# What no model, machine or file of ours has: beyond it a number is a slip, or damage, and is not computed with.
MAX_TOKENS = 1 << 24  # of a prompt or a context: the longest published are 10 million
MAX_THREADS = 512  # llama.cpp ends the process for more
MAX_BATCH = 1 << 16
MAX_WIDTH = 1 << 24  # heads, channels, hidden size; a vocabulary
MAX_LAYERS = 4096
MAX_BUDGET = 1e6  # seconds: 11 days a token
