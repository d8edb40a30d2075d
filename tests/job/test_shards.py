"""Parts of a comparison run by themselves, and are put together."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from standins.fake_job import compare_tiny

from dilap.core.errors import InvalidInput
from dilap.job import kinds
from dilap.job.shards import Shard

pytestmark = pytest.mark.usefixtures("fake_device")
ASKED: dict[str, Any] = {"budgets": ["80%", "65%"], "recover": "none"}
METHODS = ("magnitude", "shortgpt")


@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_shards_share_out_all_jobs(count: int) -> None:
    jobs = list(range(5))
    shards = (Shard(number=number, count=count) for number in range(1, count + 1))
    assert sorted(job for shard in shards for job in shard.of(jobs)) == jobs


@pytest.mark.parametrize("text", ["0/4", "5/4", "2", "2/", "a/b", "-1/2", "1/100000"])
def test_shard_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(InvalidInput, match="a shard is written 2/4"):
        Shard.parse(text)


def test_a_comparison_takes_over_what_its_shards_have_done(
    checkpoint: Path, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    halves = [compare_tiny(checkpoint, corpus, out, *METHODS, shard=f"{number}/2", **ASKED) for number in (1, 2)]
    assert [len(rows) for rows in halves] == [2, 2]
    assert not out.exists()
    monkeypatch.setattr(kinds, "DECODERS", replace(kinds.DECODERS, prune=pytest.fail))  # nothing is left to be done
    rows = compare_tiny(checkpoint, corpus, out, *METHODS, **ASKED)
    assert {(row.method, row.budget) for row in rows} == {(m, b) for m in METHODS for b in ASKED["budgets"]}
    assert all(row in rows for half in halves for row in half)


def test_shard_of_another_comparison_is_refused(checkpoint: Path, corpus: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    compare_tiny(checkpoint, corpus, out, "magnitude", shard="1/1", seed=1, **ASKED)
    with pytest.raises(InvalidInput, match="with other options than"):
        compare_tiny(checkpoint, corpus, out, "magnitude", **ASKED)
