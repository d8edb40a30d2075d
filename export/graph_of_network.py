"""A network that is no decoder as a graph of torch operators, from which the exporters of several runtimes start."""

import contextlib
import logging
import warnings
from collections.abc import Iterator

import torch
from torch import nn
from torch.export import ExportedProgram

from dilap.core.errors import Unsupported, reason_of
from dilap.core.network_input import NetworkInput
from dilap.models.network import Logits, evaluating, in_f32, random_examples


def exported_graph(model: nn.Module, input_: NetworkInput) -> ExportedProgram:
    """Return the graph of a network in f32 for batches of the given shape. Raises Unsupported where there is none."""
    network, examples = Logits(in_f32(model)), random_examples(model, input_.size, input_.batch)
    with evaluating(network), quietly(), torch.no_grad():
        try:
            return torch.export.export(network, arguments_of(examples), strict=False)
        except Unsupported:
            raise
        except Exception as error:  # whatever a module raises for inputs that it does not take, and torch's own
            raise Unsupported(f"torch cannot trace the model on inputs of {input_}: {reason_of(error)}") from error


def arguments_of(examples: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Return what a graph takes of a batch: the images, or the arrays TOKEN_INPUTS of texts (texts x 3 x tokens)."""
    return (examples,) if examples.is_floating_point() else examples.unbind(1)


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """Keep the remarks of exporters to themselves: deprecations, and optional libraries that they do not find."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
