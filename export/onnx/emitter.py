"""Builds an ONNX graph: nodes, constants and weights, in the order in which they are asked for."""

from collections.abc import Callable, Sequence

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from onnx_ir.tape import Tape

# Reads one tensor: its torch name and torch shape -> its numbers.
Values = Callable[[str, tuple[int, ...]], NDArray[np.floating]]
Array = NDArray[np.generic]

OPSET = 20  # the highest that TensorRT 10.3 parses
MICROSOFT = "com.microsoft"
_IR_VERSION = 10


class Emitter:
    """A graph under construction. What has a name is made once and used again. `dtype` is that of the activations."""

    def __init__(self, *, dtype: ir.DataType, values: Values, contrib: bool) -> None:
        opsets = {"": OPSET, MICROSOFT: 1} if contrib else {"": OPSET}
        self.dtype, self.values = dtype, values
        self.graph = ir.Graph([], [], nodes=[], opset_imports=opsets, name="decoder")
        self._tape = Tape(self.graph)
        self._made: dict[str, ir.Value] = {}

    def model(self) -> ir.Model:
        return ir.Model(self.graph, ir_version=_IR_VERSION, producer_name="dilap")

    def op(
        self,
        kind: str,
        *inputs: ir.Value | None,
        name: str | None = None,
        domain: str = "",
        **attributes: float | int | str | Sequence[int],
    ) -> ir.Value:
        """Add a node with one output and return the output."""
        return self._tape.op(kind, inputs, attributes, domain=domain, name=name)

    def ops(
        self,
        kind: str,
        *inputs: ir.Value | None,
        num_outputs: int,
        domain: str = "",
        **attributes: float | int | str | Sequence[int],
    ) -> Sequence[ir.Value]:
        """Add a node with several outputs and return them; Split is also given their number as an attribute."""
        if kind == "Split":
            attributes["num_outputs"] = num_outputs
        return self._tape.op_multi_out(kind, inputs, attributes, num_outputs=num_outputs, domain=domain)

    def input(self, name: str, shape: tuple[str | int, ...], dtype: ir.DataType = ir.DataType.INT64) -> ir.Value:
        if name not in self._made:
            self._made[name] = ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(dtype))
            self.graph.inputs.append(self._made[name])
        return self._made[name]

    def output(self, value: ir.Value, name: str, shape: tuple[str | int, ...]) -> None:
        value.name, value.shape, value.type = name, ir.Shape(shape), ir.TensorType(self.dtype)
        self.graph.outputs.append(value)

    def number(self, name: str, values: float | NDArray[np.floating]) -> ir.Value:
        """Add a constant in the dtype of the activations."""
        return self.constant(name, np.asarray(values, np.float32).astype(self.dtype.numpy()))

    def integers(self, *values: int) -> ir.Value:
        return self.constant("integers." + ".".join(map(str, values)), np.array(values, np.int64))

    def integer(self, value: int) -> ir.Value:
        return self.constant(f"integer.{value}", np.array(value, np.int64))

    def constant(self, name: str, array: Array) -> ir.Value:
        if name not in self._made:
            self._made[name] = self._tape.initializer(ir.tensor(array, name=name))
        return self._made[name]

    def weight(self, name: str, shape: tuple[int, ...], *, transposed: bool = False) -> ir.Value:
        """Add the torch tensor `name` of torch shape `shape` as a weight, `transposed` if asked."""

        def read() -> Array:
            array = self.values(name, shape)
            return array.T if transposed else array

        return self.lazy(name, shape[::-1] if transposed else shape, self.dtype, read)

    def lazy(self, name: str, shape: tuple[int, ...], dtype: ir.DataType, read: Callable[[], Array]) -> ir.Value:
        """Add an initializer whose numbers are read when the model is saved."""
        if name not in self._made:

            def tensor() -> ir.TensorProtocol:
                return ir.Tensor(np.ascontiguousarray(read(), dtype=dtype.numpy()), name=name)

            lazy = ir.LazyTensor(tensor, dtype, ir.Shape(shape), name=name)
            self._made[name] = self._tape.initializer(lazy)
        return self._made[name]
