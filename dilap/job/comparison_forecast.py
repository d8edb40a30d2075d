"""What a comparison will take, method by method; see `dilap.job.forecast`."""

from collections.abc import Callable, Sequence

from dilap.job.forecast import Machine, Need, gigabytes, in_words, speed_in_words
from dilap.job.shortages import Options, shortages


def report(jobs: Sequence[Options], needs_in: Callable[[Options], list[Need]], machine: Machine) -> list[str]:
    """Return the needs of the jobs as lines of text, one for each method.

    Memory is that of the largest stage. Times are added up over all stages and budgets, as if nothing was shared.
    """
    needs: dict[str, list[list[Need]]] = {}
    for job in jobs:
        needs.setdefault(job.method, []).append(needs_in(job))
    needs["all"] = [one for found in needs.values() for one in found]
    width = max(map(len, needs)) + 2
    return [
        f"{'method':{width}}{'runs':>4}{'on ' + str(machine.device):>12}{'host':>10}{'files':>10}{'time':>10}",
        *(_line(f"{name:{width}}", found, machine) for name, found in needs.items()),
        f"{speed_in_words(machine)}; libraries and scores that budgets share are counted for each",
    ]


def lacking(jobs: Sequence[Options], needs_in: Callable[[Options], list[Need]], machine: Machine) -> list[str]:
    """Return in words what of which jobs will not fit into the memory of a machine, and what would."""
    found = (f"{job.method}: {line}" for job in jobs for line in shortages(job, needs_in, machine))
    return list(dict.fromkeys(found))


def _line(name: str, needs: Sequence[Sequence[Need]], machine: Machine) -> str:
    stages = [one for stages in needs for one in stages]
    sizes = (
        max(one.device_bytes for one in stages),
        max(one.host_bytes for one in stages),
        max(one.file_bytes for one in stages),
    )
    seconds = sum(one.flops for one in stages) / machine.flops_per_second
    device, host, files = map(gigabytes, sizes)
    return f"{name}{len(needs):>4}{device:>12}{host:>10}{files:>10}{in_words(seconds):>10}"
