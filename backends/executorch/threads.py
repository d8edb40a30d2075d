"""The one thread pool of a process that runs ExecuTorch, which must not change under an open program."""

from dilap.backends.executorch.bindings import bindings
from dilap.core.errors import Unsupported

_holders: set[int] = set()


def use_threads(count: int) -> None:
    """Give the thread pool `count` threads. Raises Unsupported where an open program runs in another number."""
    library = bindings()
    if library._threadpool_get_thread_count() == count:
        return
    if _holders:
        have = library._threadpool_get_thread_count()
        raise Unsupported(f"models with {have} threads are open, {count} were asked for: close them first")
    library._unsafe_reset_threadpool(count)  # unsafe for programs that hold the old pool: there are none


def hold_threads(program: object) -> None:
    """Keep the number of threads until `program` releases it."""
    _holders.add(id(program))


def release_threads(program: object) -> None:
    _holders.discard(id(program))
