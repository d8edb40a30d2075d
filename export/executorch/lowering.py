"""A network as an ExecuTorch program for its XNNPACK delegate, in f32 or with 8-bit weights and activations."""

from dataclasses import dataclass

import torch
from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
from executorch.backends.xnnpack.quantizer.xnnpack_quantizer import XNNPACKQuantizer, get_symmetric_quantization_config
from executorch.exir import ExecutorchBackendConfig, ExecutorchProgramManager, to_edge_transform_and_lower
from executorch.exir.passes import MemoryPlanningPass
from torch import nn
from torch.export import ExportedProgram
from torch.fx import GraphModule, Node
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
from torchao.quantization.pt2e.quantizer import QuantizationAnnotation, QuantizationSpec
from torchao.quantization.pt2e.quantizer.quantizer import Q_ANNOTATION_KEY

from dilap.backends.inputs import whole_batches
from dilap.core.network_input import NetworkInput
from dilap.export.graph_of_network import arguments_of, exported_graph
from dilap.export.network import is_scaled_at_run_time
from dilap.models.network import Examples, random_examples

EDGE_DELEGATE = "executorch_call_delegate"


_CLIPS = (torch.ops.aten.hardtanh.default, torch.ops.aten.hardtanh_.default, torch.ops.aten.relu6.default)
_BEFORE_CLIPS = (
    torch.ops.aten.conv2d.default,
    torch.ops.aten.linear.default,
    torch.ops.aten.batch_norm.default,
)


class ClippingQuantizer(XNNPACKQuantizer):  # type: ignore[misc]
    """XNNPACK's quantizer, which gives what a ReLU6 clips its 8 bits after the clip and not before, as for a ReLU.

    XNNPACK joins both with the convolution. Before the clip, most of the 256 steps lie where nothing is left behind it.
    Whole numbers, such as positions in a text, are left as they are.
    """

    def transform_for_annotation(self, model: GraphModule) -> GraphModule:
        model = super().transform_for_annotation(model)  # which turns all numbers into floats
        for node in filter(_is_whole, model.graph.nodes):
            for one in node.args:
                if isinstance(one, Node) and one.op == "get_attr" and not _is_whole(one):
                    constant = model.get_buffer(str(one.target)).to(node.meta["val"].dtype)
                    model.register_buffer(str(one.target), constant)
        return model

    def annotate(self, model: GraphModule) -> GraphModule:
        model = super().annotate(model)
        for node in model.graph.nodes:
            if _is_whole(node):
                node.meta.pop(Q_ANNOTATION_KEY, None)
            before = node.args[0] if node.target in _CLIPS else None
            if isinstance(before, Node) and before.target in _BEFORE_CLIPS and len(before.users) == 1:
                annotation = before.meta.get(Q_ANNOTATION_KEY)
                if annotation is not None and isinstance(annotation.output_qspec, QuantizationSpec):
                    spec, annotation.output_qspec = annotation.output_qspec, None
                    node.meta[Q_ANNOTATION_KEY] = QuantizationAnnotation(output_qspec=spec, _annotated=True)
        return model


def _is_whole(node: Node) -> bool:
    """Return whether what a node gives is no tensor of floats."""
    value = node.meta.get("val")
    return isinstance(value, torch.Tensor) and not value.is_floating_point()


@dataclass(frozen=True)
class Lowered:
    """A program ready to be written, and how many operators of it are left to ExecuTorch's own, slow kernels."""

    program: ExecutorchProgramManager
    left: dict[str, int]


@torch.no_grad()
def lowered(graph: ExportedProgram) -> Lowered:
    """Hand a graph to XNNPACK, as much of it as it takes. The caller's tensors serve as they are, uncopied."""
    edge = to_edge_transform_and_lower(graph, partitioner=[XnnpackPartitioner()])
    left: dict[str, int] = {}
    for node in edge.exported_program().graph.nodes:
        name = getattr(node.target, "__name__", "")
        if node.op == "call_function" and name not in (EDGE_DELEGATE, "getitem"):
            left[name] = left.get(name, 0) + 1
    planning = MemoryPlanningPass(alloc_graph_input=False)
    return Lowered(edge.to_executorch(ExecutorchBackendConfig(memory_planning_pass=planning)), left)


@torch.no_grad()
def quantised(model: nn.Module, input_: NetworkInput, images: Examples) -> ExportedProgram:
    """Return the network's graph with 8-bit weights, a scale a channel, and activations, scaled by what `images` make.

    Those of texts have 8 bits in matrix products alone, and are scaled at run time. Batch norms become part of the
    convolutions before their weights are quantised.
    """
    settings = get_symmetric_quantization_config(is_per_channel=True, is_dynamic=is_scaled_at_run_time(input_))
    observed = prepare_pt2e(exported_graph(model, input_).module(), ClippingQuantizer().set_global(settings))
    for batch in whole_batches(images, input_.shape):
        observed(*arguments_of(torch.from_numpy(batch)))
    examples = random_examples(model, input_.size, input_.batch)
    return torch.export.export(convert_pt2e(observed), arguments_of(examples), strict=False)
