"""Damaged files and answers of every kind that DiLAP reads: each ends in success or in one line, and soon.

DILAP_FUZZ=20000 DILAP_FUZZ_SEED=7 pytest tests/test_fuzz.py     # more of them, and others (500 and 0 by default)
"""

import os
import random
import resource
import signal
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import FrameType

import pytest
from standins.fuzz_targets import answers, documents, models, texts
from standins.mutations import mutated

from dilap.core.errors import DilapError, Unfit, reason_of
from dilap.core.printable import printable

COUNT = int(os.environ.get("DILAP_FUZZ", "500"))
SEED = int(os.environ.get("DILAP_FUZZ_SEED", "0"))
SECONDS = 30.0  # for one of them, on a machine that others use too
BYTES = 3 << 30  # more than before


class TooLong(BaseException):
    """No Exception, so that nothing takes it for a damaged file."""


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # pandas leaves damaged files open
def test_damaged_input_ends_in_success_or_in_one_line(evaluated: Path, checkpoint: Path, tmp_path: Path) -> None:
    targets = {
        **documents(evaluated, tmp_path),
        **models(checkpoint, tmp_path),
        **answers(tmp_path),
        **texts(tmp_path),
    }
    for name, target in targets.items():
        with pytest.raises(Unfit) if name == "agent's refusal" else nullcontext():
            target.read(target.content)
    names, weights = list(targets), [one.weight for one in targets.values()]
    outcomes: Counter[str] = Counter()
    failures: list[str] = []
    with memory_limited(BYTES):
        for index in range(COUNT):
            draw = random.Random(f"{SEED} {index}")
            name = draw.choices(names, weights)[0]
            content = mutated(targets[name].content, draw, is_text=targets[name].is_text)
            try:
                with time_limited(SECONDS):
                    targets[name].read(content)
                outcomes["read"] += 1
            except DilapError as error:
                outcomes["refused" if printable(reason_of(error)).strip() else "refused without a word"] += 1
            except BaseException as error:
                if isinstance(error, KeyboardInterrupt | SystemExit):
                    raise
                failures.append(f"{index} {name}: {reason_of(error)} at {_where(error)}")
    print(f"{COUNT} of seed {SEED}: {dict(outcomes)}", file=sys.stderr)
    assert not outcomes["refused without a word"]
    assert not failures, f"{len(failures)} of {COUNT} ended otherwise:\n" + "\n".join(failures[:40])
    assert min(outcomes["read"], outcomes["refused"]) > COUNT / 20  # neither harmless nor beyond reading


def _where(error: BaseException) -> str:
    """The last line of ours that it came through."""
    trace, found = error.__traceback__, "?"
    while trace is not None:
        name = trace.tb_frame.f_code.co_filename
        if "site-packages" not in name:
            found = f"{Path(name).name}:{trace.tb_lineno}"
        trace = trace.tb_next
    return found


@contextmanager
def time_limited(seconds: float) -> Iterator[None]:
    def stop(_: int, __: FrameType | None) -> None:
        raise TooLong(f"more than {seconds:g} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@contextmanager
def memory_limited(num_bytes: int) -> Iterator[None]:
    pages = (
        int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[0]) if Path("/proc/self/statm").exists() else 0
    )
    before = resource.getrlimit(resource.RLIMIT_AS)
    if pages:
        resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + num_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
