"""How many processes a launcher (`torchrun`, `accelerate launch`) started for a command, and which of them this is."""

import os


def rank() -> int:
    """Return the number of this process: 0 for the main one, and for one that no launcher started."""
    return int(os.environ.get("RANK", "0"))


def local_rank() -> int:
    """Return the number of this process among those on its machine."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def engine() -> str:
    """Return the engine that `accelerate launch` was told to split models with, empty for none."""
    engines = {
        "FSDP": "ACCELERATE_USE_FSDP",
        "DeepSpeed": "ACCELERATE_USE_DEEPSPEED",
        "Megatron": "ACCELERATE_USE_MEGATRON_LM",
    }
    return next((name for name, told in engines.items() if os.environ.get(told, "").lower() == "true"), "")


def count() -> int:
    """Return how many processes there are, on all machines together."""
    return int(os.environ.get("WORLD_SIZE", "1"))
