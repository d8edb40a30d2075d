"""Groups, their tensors, and the indices that stay of them."""

import pytest

from dilap.core.groups import Group, Member, indices_kept

ROWS = Member(tensor="query.weight", axis=0, grid=(2, 3, 2))  # KV heads, query heads of each, head_dim
GROUPS = Group(name="groups", num_units=2, members=(ROWS,))
SLOTS = Group(name="slots", num_units=3, members=(Member(tensor="query.weight", axis=0, grid=(2, 3, 2), dimension=1),))


def kept(**units: tuple[int, ...]) -> list[int]:
    return [int(one) for one in indices_kept([GROUPS, SLOTS], units)["query.weight", 0]]


@pytest.mark.parametrize(
    ("units", "expected"),
    [
        ({}, list(range(12))),
        ({"groups": (1,)}, [6, 7, 8, 9, 10, 11]),
        ({"slots": (0, 2)}, [0, 1, 4, 5, 6, 7, 10, 11]),
        ({"groups": (1,), "slots": (0, 2)}, [6, 7, 10, 11]),
        ({"groups": ()}, []),
    ],
)
def test_groups_that_divide_one_axis_keep_what_both_keep(
    units: dict[str, tuple[int, ...]], expected: list[int]
) -> None:
    assert kept(**units) == expected


def test_fused_tensors_are_members_with_offsets() -> None:
    """Four query rows, then two of the keys and two of the values."""
    members = (
        Member(tensor="qkv.weight", axis=0, grid=(2, 2)),
        Member(tensor="qkv.weight", axis=0, grid=(2, 1), offset=4),
        Member(tensor="qkv.weight", axis=0, grid=(2, 1), offset=6),
        Member(tensor="out.weight", axis=1, grid=(2, 2)),
    )
    found = indices_kept([Group(name="heads", num_units=2, members=members)], {"heads": (1,)})
    assert {name: one.tolist() for name, one in found.items()} == {
        ("qkv.weight", 0): [2, 3, 5, 7],
        ("out.weight", 1): [2, 3],
    }
