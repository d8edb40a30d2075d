"""Find the residual branches whose shortcut is the identity: x + branch(x), which can be removed whole."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from dilap.core.graph import Branch
from dilap.core.groups import Group
from dilap.models.convolutional.dependencies import Dependencies


def branches_of(
    found: Dependencies, groups: Sequence[Group], crops: Mapping[str, tuple[int, ...]]
) -> tuple[Branch, ...]:
    """Return the branches of a network, none of which lies in another, in the order of its groups.

    `crops` are the rows and columns that modules take off, where they take any.
    """
    branches = []
    for node in found.nodes:
        if not _is_addition(node) or len(node.inputs) != 2:
            continue
        for shortcut, end in (node.inputs, node.inputs[::-1]):
            if _is_branch(shortcut, end, node) and (last := _last_of(shortcut, end)) is not None:
                branches.append(_branch(found, groups, last, _before(last, stop=shortcut), crops))
    order = {group.name: index for index, group in enumerate(groups)}
    taken: set[str] = set()
    kept = []
    for branch in sorted(filter(None, branches), key=lambda one: len(one.modules)):
        if taken.isdisjoint(branch.modules):
            taken.update(branch.modules)
            kept.append(branch)
    return tuple(sorted(kept, key=lambda one: order[one.groups[0]]))


def _is_addition(node: Any) -> bool:
    return str(getattr(node.module, "_grad_fn", "")).startswith("AddBackward")


def _is_branch(shortcut: Any, end: Any, addition: Any) -> bool:
    """Return whether the nodes from `end` back to `shortcut` read nothing else, and only the addition reads them."""
    inside = list(_before(end, stop=shortcut))
    numbers = {id(one) for one in inside} | {id(addition)}
    reads_others = any(not one.inputs and not _is_constant(one) for one in inside)
    is_read = any(id(out) not in numbers for one in inside for out in one.outputs)
    return bool(inside) and not reads_others and not is_read


def _last_of(shortcut: Any, end: Any) -> Any:
    """Return the last convolution or matrix through which all passes from `shortcut` to `end`; None for none."""
    return next((one for one in _before(end, stop=shortcut) if _is_dense(one) and _all_pass(one, end, shortcut)), None)


def _is_constant(node: Any) -> bool:
    """Return whether a node without inputs is a parameter or what is made of one, and not of the network's input."""
    return isinstance(node.module, nn.Parameter) or all(one is not None for one, _ in node.grad_fn.next_functions)


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
    last: Any,
    nodes: Iterator[Any],
    crops: Mapping[str, tuple[int, ...]],
) -> Branch | None:
    """Return the branch that ends with `last` if this has no inputs without the units that lie in `nodes` alone."""
    removed = [one for one in nodes if not isinstance(one.module, nn.Parameter)]
    names = {name for one in removed if (name := found.name(one)) and list(one.module.parameters(recurse=False))}
    inner = [group for group in groups if all(one.tensor.rpartition(".")[0] in names for one in group.members)]
    name, num_inputs = found.name(last), last.module.weight.shape[1]
    inputs = [one for group in inner for one in group.members if (one.tensor, one.axis) == (f"{name}.weight", 1)]
    if sum(one.span.stop - one.offset for one in inputs) != num_inputs:
        return None
    behind = [one for one in last.outputs if isinstance(one.module, _BatchNorm)]
    norm = found.name(behind[0]) if len(last.outputs) == len(behind) == 1 else ""
    return Branch(
        name=name,
        groups=tuple(group.name for group in inner),
        modules={path: crops.get(path, ()) for path in sorted({*names, norm} - {""})},
        last=name,
        norm=norm,
    )


def _is_dense(node: Any) -> bool:
    if isinstance(node.module, _ConvNd):
        return node.module.groups == 1 and not node.module.transposed
    return isinstance(node.module, nn.Linear)


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
