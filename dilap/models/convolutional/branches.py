"""Find the residual branches whose shortcut is the identity: x + branch(x), which can be removed whole."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from dilap.core.graph import Branch
from dilap.core.groups import Group, indices_kept
from dilap.models.convolutional.dependencies import Dependencies


def branches_of(
    found: Dependencies, groups: Sequence[Group], crops: Mapping[str, tuple[int, ...]]
) -> tuple[Branch, ...]:
    """Return the branches of a network, none of which lies in another, in the order of its groups.

    `crops` are the rows and columns that modules take off, where they take any.
    """
    branches: list[Branch] = []
    for node in found.nodes:
        if not _is_addition(node) or len(node.inputs) != 2:
            continue
        for shortcut, end in (node.inputs, node.inputs[::-1]):
            inside = _between(shortcut, end, node)
            branch = _branch(found, groups, shortcut, end, inside, crops) if inside else None
            if branch is not None:
                branches.append(branch)
    order = {group.name: index for index, group in enumerate(groups)}
    smallest_first = sorted(branches, key=lambda one: len(one.modules))
    taken: set[str] = set()
    kept = []
    for branch in smallest_first:
        if taken.isdisjoint(branch.modules):
            taken.update(branch.modules)
            kept.append(branch)
    return tuple(sorted(kept, key=lambda one: order[one.groups[0]]))


def _is_addition(node: Any) -> bool:
    return str(getattr(node.module, "_grad_fn", "")).startswith("AddBackward")


def _between(shortcut: Any, end: Any, addition: Any) -> list[Any]:
    """Return the nodes from `end` back to `shortcut`; none where they read or are read by anything else."""
    inside = list(_before(end, stop=shortcut))
    if any(one is not shortcut and not one.inputs and not isinstance(one.module, nn.Parameter) for one in inside):
        return []
    numbers = {id(one) for one in inside} | {id(addition)}
    if end is shortcut or any(id(out) not in numbers for one in inside for out in one.outputs):
        return []
    return inside


def _before(end: Any, *, stop: Any) -> Iterator[Any]:
    """Yield `end` and the nodes on which it depends, the nearest first, without `stop` and what lies before it."""
    waiting, seen = [end], {id(stop)}
    while waiting:
        node = waiting.pop(0)
        if id(node) in seen:
            continue
        seen.add(id(node))
        yield node
        waiting.extend(node.inputs)


def _branch(
    found: Dependencies,
    groups: Sequence[Group],
    shortcut: Any,
    end: Any,
    inside: Sequence[Any],
    crops: Mapping[str, tuple[int, ...]],
) -> Branch | None:
    """Return the branch of these nodes if it gives a constant without the units that lie in it alone."""
    last = next((one for one in inside if _is_dense(one.module) and _all_pass(one, end, shortcut)), None)
    if last is None:
        return None
    removed = [one for one in _before(last, stop=shortcut) if not isinstance(one.module, nn.Parameter)]
    names = [name for one in removed if (name := found.name(one)) and list(one.module.parameters(recurse=False))]
    name, weight = found.name(last), f"{found.name(last)}.weight"
    inner = [group for group in groups if all(_lies_in(one.tensor, names) for one in group.members)]
    stays = indices_kept(inner, {group.name: () for group in inner})
    if len(stays.get((weight, 1), (0,))) or not _covers(inner, weight, last.module.weight.shape[1]):
        return None
    behind = [one for one in last.outputs if isinstance(one.module, _BatchNorm)]
    norm = found.name(behind[0]) if len(last.outputs) == len(behind) == 1 else ""
    return Branch(
        name=name,
        groups=tuple(group.name for group in inner),
        modules={path: crops.get(path, ()) for path in sorted({*names, *([norm] if norm else [])})},
        last=name,
        norm=norm,
    )


def _is_dense(module: object) -> bool:
    if isinstance(module, nn.modules.conv._ConvNd):
        return module.groups == 1 and not module.transposed
    return isinstance(module, nn.Linear)


def _all_pass(node: Any, end: Any, shortcut: Any) -> bool:
    """Return whether all that `end` has of `shortcut` comes through `node`."""
    seen = {id(node)}
    waiting = [end]
    while waiting:
        one = waiting.pop()
        if id(one) in seen:
            continue
        if one is shortcut:
            return False
        seen.add(id(one))
        waiting.extend(one.inputs)
    return True


def _lies_in(tensor: str, modules: Sequence[str]) -> bool:
    return tensor.rpartition(".")[0] in modules


def _covers(groups: Sequence[Group], weight: str, size: int) -> bool:
    """Return whether all inputs of a matrix belong to units of these groups."""
    members = [one for group in groups for one in group.members if (one.tensor, one.axis) == (weight, 1)]
    return sum(one.span.stop - one.offset for one in members) == size
