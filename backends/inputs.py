"""What the sessions of all runtimes share: the tokens that are timed, and what the switches are set to."""

import random
from collections.abc import Mapping

from dilap.core.workload import Workload


def random_tokens(count: int, *, vocab_size: int) -> list[int]:
    """Return random token ids, the same ones at every call."""
    draw = random.Random(0)
    return [draw.randrange(vocab_size) for _ in range(count)]


def setting(workload: Workload, switches: Mapping[str, tuple[str, ...]], name: str) -> str:
    """Return the value of a switch: the runtime's own default, its first, where the workload does not name it."""
    return workload.switches.get(name, switches[name][0])


def num_together(count: int, *, incremental: bool) -> int:
    """Return how many of `count` tokens are run in one pass: all, or all but a last quarter that is run one by one."""
    return count - (-(-count // 4) if incremental else 0)
