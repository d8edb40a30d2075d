"""Recovery in closed form: refit every output projection that is left, in order, on its inputs in the pruned model.

Where the config has precisions, every matrix is rounded there too, with the errors of its first columns compensated by
the others. Experts have no output projection, and stay as they are, or are only rounded.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn
from transformers import PreTrainedModel

from dilap.core.errors import Unsupported
from dilap.models.anatomy import decoder_layers
from dilap.models.compute import batches, compute_precision
from dilap.models.compute_device import HOST
from dilap.models.cut import Parameters
from dilap.models.families import family_of
from dilap.models.matrices import put_, replaced
from dilap.models.processes import ALONE, Processes
from dilap.models.reference import Teacher, final_hidden
from dilap.models.rounding import compensated
from dilap.models.skipping import Known, layers_replaced
from dilap.models.statistics import InputStatistics, LayerCall, State, layer_calls
from dilap.search.allocation import Config
from dilap.search.options import RefitOptions
from dilap.search.supernet import Supernet

_DEFAULTS = RefitOptions()


@dataclass(frozen=True, kw_only=True)
class Refit:
    """The parameters that a plan changes, by name, and the KL with them on validation text.

    `correction` is None where no refit was better than the library's projections, which these are then.
    """

    parameters: Parameters
    correction: float | None
    kl: float


def best_refit(
    net: Supernet,
    config: Config,
    tokens: torch.Tensor,
    *,
    teacher: Teacher,
    options: RefitOptions = _DEFAULTS,
    processes: Processes = ALONE,
    progress: Callable[[int], None] = lambda _: None,
) -> Refit:
    """Return the first refit on `tokens` (sequences x length) that lowers the KL on the teacher's text.

    Where none does, return the library's projections; those of a config with precisions are rounded, compensated if
    that lowers the KL. `net` is dense again afterwards. Where several `processes` do this together, the teacher of each
    has its share of the validation text, and each takes its share of `tokens`.
    """

    def kl_with(parameters: Parameters) -> float:
        return float(processes.joined(net.kls(teacher, config, parameters=parameters)).double().mean())

    found = Refit(parameters=net.parameters(config), correction=None, kl=kl_with({}))
    attempts = (*options.corrections, None) if net.is_rounded(config) else options.corrections
    for correction in attempts:
        made = refit_sequentially(
            net, config, tokens, correction=correction, options=options, processes=processes, progress=progress
        )
        kl = kl_with(made)
        if kl < found.kl:
            found = Refit(parameters=made, correction=correction, kl=kl)
            break
    net.close()
    return found


def refit_refusal(model: PreTrainedModel) -> str | None:
    """Return why the projections of a model cannot be refitted in sequence, None where they can."""
    try:
        family_of(model.config).residual_scale(model.config)
    except Unsupported as error:
        return str(error)
    return None


@torch.no_grad()
def refit_sequentially(
    net: Supernet,
    config: Config,
    tokens: torch.Tensor,
    *,
    correction: float | None,
    options: RefitOptions = _DEFAULTS,
    processes: Processes = ALONE,
    progress: Callable[[int], None] = lambda _: None,
) -> dict[str, torch.Tensor]:
    """Return the parameters at `config`, by name, fitted on `tokens` (sequences x length): projections over the columns
    that stay, and all other matrices that are rounded, in their dense shapes.

    The dense and the pruned model are run side by side, layer by layer. For a sublayer with inputs x in the pruned
    model, output y in the dense one, and residual streams r (dense) and r' (pruned) before it, the projection minimises
    |W x - (y + correction (r - r'))|^2 + ridge |W - W_library|^2. So later sublayers make up for the errors of earlier
    ones, which the library cannot do, because it is fitted on inputs of the dense model. In a sublayer with a precision
    the matrices before the projection are rounded first, so that x has their errors, and the projection afterwards.
    Without a correction projections are the library's, and only rounded. `net` is dense again afterwards. Where several
    `processes` do this together, each runs its share of the tokens, and all get the same parameters. Raises
    Unsupported for a correction in a family that does more than add its sublayers' outputs to the residual stream.
    """
    net.close()
    num_tokens, tokens = tokens.numel(), processes.share(tokens)
    scale = 1.0 if correction is None else family_of(net.model.config).residual_scale(net.model.config)
    calls = layer_calls(net.model, tokens, batch_tokens=options.batch_tokens)
    dense_states = [call.hidden for call in calls]
    pruned_states, found = _entering(net, config, tokens, dense_states, options=options)
    for number, layer in enumerate(decoder_layers(net.model)):
        indices = [i for i, sublayer in enumerate(net.sublayers) if sublayer.layer == number]
        trace_of = partial(_trace, layer, number, net=net, indices=indices, scale=scale)
        traces = list(map(trace_of, calls, dense_states))
        traces_until = partial(_traces_until, trace_of, calls, pruned_states)
        for i in indices:
            fit = net.library[i][config[i]]
            net.write(i, fit.columns, fit.weight)
        results = pruned_states  # stays so for a layer that loses both sublayers
        for i in indices:
            fit = net.library[i][config[i]]
            if len(fit.columns) == 0:
                continue
            if fit.precision:
                found |= _round_inputs(net, i, fit.precision, traces_until, processes=processes)
            if i in net.routings:
                results = [one.result for one in map(trace_of, calls, pruned_states)]
                continue
            here = traces_until(net.outs[i])
            problem = _Problem(fit.weight.to(net.model.device), fit.columns, net.biases[i], ridge=options.ridge)
            for one, dense in zip(here, traces, strict=True):
                gap = (dense.residuals[i] - one.residuals[i]) / scale
                problem.add(one.reached, dense.outputs[i].float() + (correction or 0.0) * gap.float())
            processes.sum_(problem.H, problem.R)
            solved = problem.weight if correction is None else problem.solve()
            if fit.precision:
                solved = compensated(solved, problem.H, fit.precision)
            kept = solved if fit.precision else solved.to(net.outs[i].weight.dtype)  # as the cut model has it
            found[net.matrices[i][-1]] = kept.to(HOST)
            net.write(i, fit.columns, solved)
            if correction is None:
                results = [one.result for one in map(trace_of, calls, pruned_states)]
                continue
            with compute_precision(net.model.device):  # the layer's output with the new projection
                results = [
                    one.residuals[i] + scale * net.outs[i](one.reached).reshape(one.residuals[i].shape) for one in here
                ]
        dense_states = [trace.result for trace in traces]
        pruned_states = results
        for i in indices:
            net.restore(i)
        progress(num_tokens)
    return found | _rounded_head(net, config, tokens, pruned_states, options=options, processes=processes)


def _entering(
    net: Supernet, config: Config, tokens: torch.Tensor, dense: list[State], *, options: RefitOptions
) -> tuple[list[State], dict[str, torch.Tensor]]:
    """Return what enters the pruned model's first layer, by batch, and the embedding, by name, where it is rounded.

    `dense` is what enters the dense model's.
    """
    level = net.head_level(config)
    if not level.embedding:
        return dense, {}
    embedding = {net.embedding_name: net.whole(level)[net.embedding_name]}
    with replaced(net.model, embedding):
        calls = layer_calls(net.model, tokens, batch_tokens=options.batch_tokens)
    return [call.hidden for call in calls], embedding


def _round_inputs(
    net: Supernet,
    index: int,
    precision: str,
    traces_until: Callable[[nn.Module], Iterable["_Trace"]],
    *,
    processes: Processes,
) -> dict[str, torch.Tensor]:
    """Round the matrices before a sublayer's projection in the model, and return them by name.

    Their errors are compensated for the inputs that they have in the traces, which `traces_until` the first of them
    gives; those of experts are not, because every expert has other inputs.
    """
    names = net.inputs(index)
    if index in net.routings:
        values = {name: net.matrix(name, precision) for name in names}
    else:
        first = net.model.get_submodule(names[0].removesuffix(".weight"))  # the others read the same
        gram = _gram((trace.reached for trace in traces_until(first)), processes)
        values = {name: compensated(net.dense[name], gram, precision).to(net.dense[name].dtype) for name in names}
    for name, value in values.items():
        put_(net.model, name, value)
    return values


def _gram(inputs: Iterable[torch.Tensor], processes: Processes) -> torch.Tensor:
    """Return X'X (inputs x inputs) of the inputs X of a matrix, which come in batches, from all processes."""
    statistics = InputStatistics()
    for batch in inputs:
        statistics.add(batch, covariance=True)
    statistics.pool_(processes)
    assert statistics.covariance_sum is not None  # a batch has tokens
    return statistics.covariance_sum


def _rounded_head(
    net: Supernet,
    config: Config,
    tokens: torch.Tensor,
    states: list[State],
    *,
    options: RefitOptions,
    processes: Processes,
) -> dict[str, torch.Tensor]:
    """Return the head by its name where it is rounded and no longer the embedding, compensated for its inputs.

    `states` are what leaves the last layer, by batch.
    """
    level = net.head_level(config)
    if not level.head or net.is_tied(level):
        return {}
    dense, statistics = net.dense[net.head_name], InputStatistics()
    with layers_replaced(net.model, {len(decoder_layers(net.model)) - 1: Known(states)}):
        for batch in batches(tokens, batch_tokens=options.batch_tokens, device=net.model.device):
            statistics.add(final_hidden(net.model, batch), covariance=True)
    statistics.pool_(processes)
    assert statistics.covariance_sum is not None  # a batch has tokens
    return {net.head_name: compensated(dense, statistics.covariance_sum, level.head).to(dense.dtype)}


@dataclass(frozen=True, kw_only=True)
class _Trace:
    """What happens in one layer on one batch: inputs and outputs of the output projections, and the residual stream
    before the sublayers, by the sublayer.

    A run ends with the layer's `result`, or at a module before that, whose inputs are `reached`; the other is empty.
    """

    inputs: dict[int, torch.Tensor]
    outputs: dict[int, torch.Tensor]
    residuals: dict[int, torch.Tensor]
    result: torch.Tensor
    reached: torch.Tensor


class _Reached(Exception):
    """The module for which a layer was run has its inputs."""


def _trace(
    layer: nn.Module,
    number: int,
    call: LayerCall,
    state: torch.Tensor,
    *,
    net: Supernet,
    indices: Sequence[int],
    scale: float,
    until: nn.Module | None = None,
) -> _Trace:
    """Run the layer of that number, or only as far as the module `until`, and record what happens in it.

    `scale` is the factor of a sublayer's output where it is added to the residual stream.
    """
    inputs: dict[int, torch.Tensor] = {}
    outputs: dict[int, torch.Tensor] = {}
    result, reached = torch.zeros(0), [torch.zeros(0)]

    def record(index: int) -> Callable[[nn.Module, tuple[torch.Tensor, ...], torch.Tensor], None]:
        def hook(_: nn.Module, arguments: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
            inputs[index], outputs[index] = arguments[0], output.reshape(state.shape)

        return hook

    def stop(_: nn.Module, arguments: tuple[torch.Tensor, ...]) -> None:
        reached[:] = arguments[:1]
        raise _Reached

    hooks = [net.outs[index].register_forward_hook(record(index)) for index in indices]
    hooks += [] if until is None else [until.register_forward_pre_hook(stop)]
    try:
        with compute_precision(state.device):
            result = layer(state, **call.arguments[number])
    except _Reached:
        pass
    finally:
        for hook in hooks:
            hook.remove()
    residuals, stream = {}, state
    for index in indices:  # attention first: its output joins the stream that the FFN reads
        residuals[index] = stream
        if index in outputs:
            stream = stream + scale * outputs[index]
    return _Trace(inputs=inputs, outputs=outputs, residuals=residuals, result=result, reached=reached[0])


def _traces_until(
    trace_of: Callable[..., _Trace], calls: Sequence[LayerCall], states: Sequence[torch.Tensor], module: nn.Module
) -> list[_Trace]:
    """Run a layer on all batches as far as `module`, which is cheaper than all of it; `trace_of` is its `_trace`."""
    return [trace_of(call, state, until=module) for call, state in zip(calls, states, strict=True)]


class _Problem:
    """A least squares problem for one projection (hidden x kept columns), accumulated over batches."""

    def __init__(self, weight: torch.Tensor, columns: torch.Tensor, bias: torch.Tensor | None, *, ridge: float) -> None:
        self.columns, self.ridge = columns, ridge
        self.weight = weight.float()
        self.bias = self.weight.new_zeros(len(weight)) if bias is None else bias.float()
        self.H = self.weight.new_zeros(len(columns), len(columns))
        self.R = self.weight.new_zeros(len(columns), len(weight))

    def add(self, inputs: torch.Tensor, output: torch.Tensor) -> None:
        """Add inputs (... x all columns) with the output (... x hidden) that is wanted for them, bias included."""
        x = inputs.reshape(-1, inputs.shape[-1])[:, self.columns].float()
        self.H.addmm_(x.T, x)
        self.R.addmm_(x.T, (output.float() - self.bias).reshape(-1, self.weight.shape[0]))

    def solve(self) -> torch.Tensor:
        """Return the projection that fits the outputs best, with its difference from the library's penalised."""
        damping = self.ridge * self.H.diagonal().mean()
        H = self.H + damping * torch.eye(len(self.columns), device=self.H.device)
        return torch.cholesky_solve(self.R + damping * self.weight.T, torch.linalg.cholesky(H)).T.contiguous()
