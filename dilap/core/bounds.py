"""Upper bounds of numbers in files and arguments: a larger one is a mistake or damage, and is refused."""

MAX_TOKENS = 1 << 24  # of a prompt or a context: the longest published are 10 million
MAX_THREADS = 512  # llama.cpp ends the process for more
MAX_BATCH = 1 << 16
MAX_WIDTH = 1 << 24  # heads, channels, hidden size; a vocabulary
MAX_SIDE = 1 << 14  # pixels of an image in height or width; its channels
MAX_LAYERS = 4096
MAX_BUDGET = 1e6  # seconds for a token or a prompt: 11 days
