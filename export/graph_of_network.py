"""An image network as a graph of torch operators, from which the exporters of several runtimes start."""

import contextlib
import logging
import warnings
from collections.abc import Iterator

import torch
from torch import nn
from torch.export import ExportedProgram

from dilap.core.errors import Unsupported, reason_of
from dilap.core.images import ImageInput
from dilap.models.network import Logits, evaluating, in_f32


def exported_graph(model: nn.Module, input_: ImageInput) -> ExportedProgram:
    """Return the graph of a network in f32 for batches of the given shape. Raises Unsupported where there is none."""
    network = Logits(in_f32(model))
    with evaluating(network), quietly(), torch.no_grad():
        try:
            return torch.export.export(network, (torch.zeros(input_.shape),), strict=False)
        except Unsupported:
            raise
        except Exception as error:  # whatever a module raises for images that it does not take, and torch's own
            raise Unsupported(f"torch cannot trace the model on images of {input_}: {reason_of(error)}") from error


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
