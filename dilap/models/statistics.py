"""Run calibration text through a model layer by layer, and collect statistics of the layers' inputs for all methods.

The inputs and statistics of only one layer are held at a time. So pruning a model needs memory for the model, for two
copies of the hidden states and for the statistics of one layer, where the model is. With a `device`, one layer at a
time is moved to it, and all else stays where it was.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import nn
from transformers import PreTrainedModel

from dilap.models.anatomy import decoder_layers
from dilap.models.compute import batches, compute_precision
from dilap.models.compute_device import widest_float
from dilap.models.families import family_of
from dilap.models.families.family import Family
from dilap.models.modeling_dilap import linear_at
from dilap.models.processes import ALONE, Processes

Propagate = Literal["dense", "pruned"]
Role = Literal["attention_in", "attention_out", "ffn_in", "ffn_out"]
State = torch.Tensor
OUTPUTS: tuple[tuple[str, Role], ...] = (("attention", "attention_out"), ("ffn", "ffn_out"))  # kind of sublayer, role


@dataclass(kw_only=True)
class InputStatistics:
    """Sums over the tokens that entered a projection, in f32 or better; projections with the same input share them.

    The mean and the variance are merged batch by batch (Chan et al.), in f64 where the device has it, because a sum of
    squares minus a squared mean loses its digits where a channel's mean is large. `covariance_sum` is X'X (channels x
    channels) and `kept` are the inputs themselves (tokens x channels), both only where they are asked for.
    """

    num_tokens: int = 0
    num_sequences: int = 0
    mean: torch.Tensor = field(default_factory=lambda: torch.zeros(0))
    squared_deviations: torch.Tensor = field(default_factory=lambda: torch.zeros(0))
    sum_squares: torch.Tensor = field(default_factory=lambda: torch.zeros(0))
    covariance_sum: torch.Tensor | None = None
    kept: list[torch.Tensor] = field(default_factory=list)

    def add(self, inputs: torch.Tensor, *, covariance: bool = False, keep: bool = False) -> None:
        """Add inputs (sequences x tokens x channels), or (tokens x channels) where the family flattens them."""
        x = inputs.detach().reshape(-1, inputs.shape[-1]).float()
        if keep:
            self.kept.append(x)
        wide = widest_float(x.device)
        count, mean = len(x), x.to(wide).mean(0)
        deviations = (x - mean.float()).square().to(wide).sum(0)
        squares = x.square().to(wide).sum(0)
        if self.num_tokens == 0:
            self.mean, self.squared_deviations, self.sum_squares = mean, deviations, squares
        else:
            total, shift = self.num_tokens + count, mean - self.mean
            self.mean = self.mean + shift * count / total
            self.squared_deviations += deviations + shift.square() * self.num_tokens * count / total
            self.sum_squares += squares
        if covariance:
            with torch.autocast(x.device.type, enabled=False):
                if self.covariance_sum is None:
                    self.covariance_sum = x.new_zeros(x.shape[1], x.shape[1])
                self.covariance_sum.addmm_(x.T, x)  # f32: after rounding to bf16 it would not be positive definite
        self.num_tokens += count
        self.num_sequences += inputs.shape[0] if inputs.dim() == 3 else 1

    def pool_(self, processes: Processes) -> None:
        """Make these the sums over the tokens of all processes; inputs that are kept stay those of this one."""
        if processes.count == 1:
            return
        counts = torch.tensor([self.num_tokens, self.num_sequences], device=self.mean.device)
        mean = self.num_tokens * self.mean
        processes.sum_(counts, mean)
        num_tokens, num_sequences = counts.tolist()
        mean /= num_tokens
        self.squared_deviations += self.num_tokens * (self.mean - mean).square()
        processes.sum_(self.squared_deviations, self.sum_squares)
        if self.covariance_sum is not None:
            processes.sum_(self.covariance_sum)
        self.num_tokens, self.num_sequences, self.mean = num_tokens, num_sequences, mean

    @property
    def variance(self) -> torch.Tensor:
        """Sample variance of every channel (channels)."""
        return (self.squared_deviations / max(1, self.num_tokens - 1)).float()

    @property
    def norms(self) -> torch.Tensor:
        """Root mean square of every channel over the tokens (channels): Wanda's norm up to a constant factor."""
        return (self.sum_squares / max(1, self.num_tokens)).sqrt().float()

    @property
    def covariance(self) -> torch.Tensor:
        """X'X divided by the number of tokens (channels x channels)."""
        assert self.covariance_sum is not None, "layer_statistics was not asked for covariances"
        return self.covariance_sum / self.num_tokens


@dataclass(frozen=True, kw_only=True)
class Step:
    """One layer of a model: its statistics by role, and the hidden states that enter it and leave it, by batch.

    `outputs` are those of the layer before the body of the loop changes it.
    """

    index: int
    layer: nn.Module
    statistics: dict[Role, InputStatistics]
    inputs: Sequence[State]
    outputs: Sequence[State]


@dataclass(frozen=True, kw_only=True)
class LayerCall:
    """The hidden states that enter the first layer for one batch, and the other arguments of every layer, by its index.

    Layers of several kinds get their own masks and rotary embeddings.
    """

    hidden: State
    arguments: Sequence[dict[str, Any]]


def paths_of(family: Family, role: Role) -> tuple[str, ...]:
    """Return the paths of the matrices in a layer that read the input of that role."""
    kind, _, side = role.partition("_")
    return family.inputs_of(kind) if side == "in" else (family.output_of(kind),)


@torch.no_grad()
def layer_statistics(
    model: PreTrainedModel,
    tokens: torch.Tensor,
    *,
    roles: Sequence[Role] = ("attention_out", "ffn_out"),
    covariance: bool = False,
    keep_inputs: bool = False,
    propagate: Propagate = "dense",
    batch_tokens: int = 2048,
    device: torch.device | None = None,
    processes: Processes = ALONE,
    progress: Callable[[int], None] = lambda _: None,
) -> Iterator[Step]:
    """Yield every layer with the statistics of its inputs on `tokens` (sequences x length).

    The body of the loop may change `step.layer` in place. With `propagate="pruned"` the layer is then run once more, so
    that the next layer gets what the changed one gives. Padding is not supported: all sequences have the same length.
    `covariance` and `keep_inputs` ask for X'X and for the inputs themselves; `progress` gets the number of tokens that
    went through a layer. Where several `processes` do this together, each runs its share of the sequences, and all get
    the same statistics; inputs, outputs and states are those of the share.
    """
    family = family_of(model.config)
    calls = layer_calls(model, processes.share(tokens), batch_tokens=batch_tokens)
    states = [call.hidden for call in calls]

    def run(layer: nn.Module, index: int) -> list[State]:
        pairs = zip(calls, states, strict=True)
        return [run_layer(layer, call.arguments[index], state, device) for call, state in pairs]

    for index, layer in enumerate(decoder_layers(model)):
        home = next(layer.parameters()).device
        layer.to(device or home)
        statistics: dict[Role, InputStatistics] = {role: InputStatistics() for role in roles}
        with _Hooks(layer, family, statistics, covariance=covariance, keep=keep_inputs):
            outputs = run(layer, index)
        for one in statistics.values():
            one.pool_(processes)
        yield Step(index=index, layer=layer, statistics=statistics, inputs=states, outputs=outputs)
        if propagate == "pruned":
            outputs = run(layer, index)
        layer.to(home)
        states = outputs
        progress(tokens.numel())


def run_layer(
    layer: nn.Module, arguments: Mapping[str, Any], state: State, device: torch.device | None = None
) -> State:
    """Return a layer's output for the hidden states `state`, computed on `device` and moved to where `state` is."""
    if device is None:
        with compute_precision(state.device):
            return first_of(layer(state, **arguments))
    there = {name: _moved(value, device) for name, value in arguments.items()}
    return first_of(layer(state.to(device), **there)).to(state.device)


def first_of(result: Any) -> State:
    """Return the hidden states in a layer's result, which is a tensor or a tuple that starts with one."""
    state: State = result[0] if isinstance(result, tuple) else result
    return state


def _moved(value: Any, device: torch.device) -> Any:
    if isinstance(value, torch.Tensor):
        return value.to(device)
    return tuple(_moved(one, device) for one in value) if isinstance(value, tuple) else value


class _Hooks:
    """Adds the inputs of a layer's projections to their statistics until the context is left."""

    def __init__(
        self,
        layer: nn.Module,
        family: Family,
        statistics: dict[Role, InputStatistics],
        *,
        covariance: bool,
        keep: bool,
    ) -> None:
        self.covariance, self.keep, self.handles = covariance, keep, []
        for role, collected in statistics.items():
            matrix = linear_at(layer, paths_of(family, role)[0])  # the role's other matrices read the same input
            if matrix is not None:
                self.handles.append(matrix.register_forward_pre_hook(self._collect(collected)))

    def _collect(self, statistics: InputStatistics) -> Callable[[nn.Module, tuple[torch.Tensor, ...]], None]:
        return lambda _, inputs: statistics.add(inputs[0], covariance=self.covariance, keep=self.keep)

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        for handle in self.handles:
            handle.remove()


class _Recorder(nn.Module):
    """Takes the place of a layer, so that a cheap pass records what it is called with beside the hidden states."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden: list[State] = []
        self.arguments: list[dict[str, Any]] = []

    def forward(self, hidden_states: torch.Tensor, **arguments: Any) -> torch.Tensor:
        self.hidden.append(hidden_states)
        self.arguments.append(arguments)
        return hidden_states


@torch.no_grad()
def layer_calls(model: PreTrainedModel, tokens: torch.Tensor, *, batch_tokens: int) -> list[LayerCall]:
    """Return what the layers are called with, for every batch of `tokens` (sequences x length)."""
    path, layers = family_of(model.config).layers, decoder_layers(model)
    recorders = [_Recorder() for _ in layers]
    model.set_submodule(path, nn.ModuleList(recorders))
    try:
        for batch in batches(tokens, batch_tokens=batch_tokens, device=model.device):
            with compute_precision(model.device):
                model.model(input_ids=batch, use_cache=False)
    finally:
        model.set_submodule(path, layers)
    of_batches = zip(*(recorder.arguments for recorder in recorders), strict=True)
    pairs = zip(recorders[0].hidden, of_batches, strict=True)
    return [LayerCall(hidden=hidden, arguments=arguments) for hidden, arguments in pairs]
