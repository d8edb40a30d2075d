"""Parts of a comparison that run by themselves, in any order and on any machines, and are put together afterwards."""

import re
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from dilap.core.codec import digest, read_json, written_aside
from dilap.core.errors import InvalidInput
from dilap.core.progress import Progress
from dilap.job.run_folder import changes

T = TypeVar("T")
_MOST = 10_000


@dataclass(frozen=True, kw_only=True)
class Shard:
    """One of `count` equal parts of a comparison, the first with the number 1."""

    number: int
    count: int

    @classmethod
    def parse(cls, text: str) -> "Shard":
        """Parse `2/4`, the second of four. Raises InvalidInput."""
        match = re.fullmatch(r"(\d{1,5})/(\d{1,5})", text)
        if match is None or not 1 <= int(match[1]) <= int(match[2]) <= _MOST:
            raise InvalidInput(f"a shard is written 2/4, the second of four, got {text!r:.40}")
        return cls(number=int(match[1]), count=int(match[2]))

    def of(self, jobs: Sequence[T]) -> list[T]:
        """Return the jobs of this shard; those of all shards together are all jobs, each once."""
        return list(jobs[self.number - 1 :: self.count])

    def folder(self, out: Path) -> Path:
        """Return the folder of this shard of the comparison `out`, which lies beside it."""
        return out.with_name(f"{out.name}.shard-{self.number}-of-{self.count}")


def take_over(out: Path, progress: Progress) -> None:
    """Copy the finished runs of all shards beside the comparison `out` into it, but those that it has already.

    Raises InvalidInput for a shard that was made with other options or from other inputs.
    """
    for shard in sorted(out.parent.glob(f"{out.name}.shard-*-of-*")):
        runs = list(_finished(shard))
        if runs:
            _require_same(shard, out)
        new = [run for run in runs if not (out / run).exists()]
        for run in new:
            with written_aside(out / run) as folder:
                shutil.copytree(shard / run, folder)
        if new:
            progress.say(f"{len(new)} runs of {shard.name} are taken over")


def _finished(shard: Path) -> Iterator[Path]:
    """Yield the folders of the runs in a shard that have a row, as they are called in the comparison."""
    for row in sorted(shard.glob("runs/*/*/row.json")):
        yield row.parent.relative_to(shard)


def _require_same(shard: Path, out: Path) -> None:
    options = (read_json(one / "shared" / "identity.json") for one in (shard, out))
    if len({digest(one) for one in options}) > 1:
        raise InvalidInput(f"{shard} is of a comparison with other options than {out}; move it away, or run it again")
    inputs = [one / "shared" / "inputs.json" for one in (shard, out)]
    if inputs[1].exists() and (changed := changes(read_json(inputs[0]), read_json(inputs[1]))):
        raise InvalidInput(f"{changed} in {shard} differs from that in {out}; move it away, or run it again")
