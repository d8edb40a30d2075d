"""The parts of transformers' encoders that can go: the heads and the feed-forward channels of every layer.

Their places are known, so that no graph is needed to find them; they are proven as those of any network are. The hidden
size stays.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from dilap.core.graph import Branch
from dilap.core.groups import Group, Member


@dataclass(frozen=True, kw_only=True)
class _Sublayer:
    """Where the matrices of a sublayer are in an encoder layer: those that give its units, and the one that reads them.

    `norm` stands in the residual branch, so that it goes with the sublayer; it is empty where the norm stands behind
    the addition, and stays.
    """

    first: tuple[str, ...]
    last: str
    norm: str = ""


@dataclass(frozen=True, kw_only=True)
class _Places:
    """The sublayers of an encoder layer. `head_dim` is the attribute that has the numbers of a head."""

    attention: _Sublayer
    head_dim: str
    ffn: _Sublayer


_LIKE_BERT = _Places(
    attention=_Sublayer(
        first=("attention.self.query", "attention.self.key", "attention.self.value"), last="attention.output.dense"
    ),
    head_dim="attention.self.attention_head_size",
    ffn=_Sublayer(first=("intermediate.dense",), last="output.dense"),
)
_LIKE_VIT = _Places(
    attention=_Sublayer(
        first=("attention.q_proj", "attention.k_proj", "attention.v_proj"),
        last="attention.o_proj",
        norm="layernorm_before",
    ),
    head_dim="attention.head_dim",
    ffn=_Sublayer(first=("mlp.fc1",), last="mlp.fc2", norm="layernorm_after"),
)
# By the classes of encoder layers. MiniLM is a BERT.
LAYERS: Mapping[str, _Places] = {
    "BertLayer": _LIKE_BERT,
    "RobertaLayer": _LIKE_BERT,
    "XLMRobertaLayer": _LIKE_BERT,
    "ViTLayer": _LIKE_VIT,
    "DeiTLayer": _LIKE_VIT,
}


@dataclass(frozen=True, kw_only=True)
class EncoderParts:
    """What can go in the encoder layers of a network; `attention` are the layers of queries and of values."""

    groups: tuple[Group, ...]
    branches: tuple[Branch, ...]
    attention: frozenset[str]


def encoder_parts(model: nn.Module) -> EncoderParts | None:
    """Return what can go in the encoder layers that a network has; None where it has none of the known classes."""
    layers = list(_layers(model))
    if not layers:
        return None
    groups, branches, attention = [], [], set()
    for path, layer, places in layers:
        for sublayer in (places.attention, places.ffn):
            if not isinstance(layer.get_submodule(sublayer.last), nn.Linear):
                continue  # removed before
            is_attention = sublayer is places.attention
            unit_size = _attribute(layer, places.head_dim) if is_attention else 1
            group = _group(model, path, sublayer, name="heads" if is_attention else "channels", unit_size=unit_size)
            groups.append(group)
            branches.append(_branch(path, sublayer, group))
            if is_attention:
                attention |= {f"{path}.{sublayer.first[0]}", f"{path}.{sublayer.first[2]}"}
    return EncoderParts(groups=tuple(groups), branches=tuple(branches), attention=frozenset(attention))


def equal_widths(model: nn.Module) -> Mapping[str, int] | None:
    """Return the entries of a config that say how wide all layers of an encoder are; None where they differ."""
    widths = []
    for _, layer, places in _layers(model):
        inner, outer = layer.get_submodule(places.attention.last), layer.get_submodule(places.ffn.last)
        if not isinstance(inner, nn.Linear) or not isinstance(outer, nn.Linear):
            return None
        head_dim = _attribute(layer, places.head_dim)
        one = {"intermediate_size": outer.in_features}
        if inner.in_features != inner.out_features:  # the number of heads says how large they are, unless this is said
            one |= {"num_attention_heads": inner.in_features // head_dim, "head_dim": head_dim}
        widths.append(one)
    return widths[0] if widths and all(one == widths[0] for one in widths) else None


def _layers(model: nn.Module) -> Iterator[tuple[str, nn.Module, _Places]]:
    for path, module in model.named_modules():
        if (places := LAYERS.get(type(module).__name__)) is not None:
            yield path, module, places


def _attribute(layer: nn.Module, path: str) -> int:
    module, _, name = path.rpartition(".")
    return int(getattr(layer.get_submodule(module), name))


def _group(model: nn.Module, path: str, sublayer: _Sublayer, *, name: str, unit_size: int) -> Group:
    last: Any = model.get_submodule(f"{path}.{sublayer.last}")
    num_units = last.in_features // unit_size
    grid = (num_units, unit_size)[: 1 + (unit_size > 1)]
    rows = [f"{path}.{one}.{kind}" for one in sublayer.first for kind in ("weight", "bias")]
    own = dict(model.named_parameters())
    members = [Member(tensor=tensor, axis=0, grid=grid) for tensor in rows if tensor in own]
    members.append(Member(tensor=f"{path}.{sublayer.last}.weight", axis=1, grid=grid))
    return Group(name=f"{path}.{name}", num_units=num_units, members=tuple(members))


def _branch(path: str, sublayer: _Sublayer, group: Group) -> Branch:
    inside: Sequence[str] = sorted(one for one in (*sublayer.first, sublayer.last, sublayer.norm) if one)
    last = f"{path}.{sublayer.last}"
    return Branch(name=last, groups=(group.name,), modules={f"{path}.{one}": () for one in inside}, last=last)
