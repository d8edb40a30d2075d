"""Amounts of tokens as people write them."""

import argparse

import pytest

from dilap.cli.arguments import amount


@pytest.mark.parametrize(
    ("text", "tokens"),
    [("200M", 200_000_000), ("1.5B", 1_500_000_000), ("64k", 64_000), ("1000", 1000), ("1e6", 10**6)],
)
def test_amount_may_end_in_a_factor(text: str, tokens: int) -> None:
    assert amount(1, 10**12)(text) == tokens


@pytest.mark.parametrize("text", ["", "M", "-1", "0", "1.5", "1e13", "nan", "inf", "ten", "2T"])
def test_amount_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="200M for one"):
        amount(1, 10**12)(text)
