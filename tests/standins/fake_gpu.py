"""A made-up accelerator: torch's CPU computes for it, and an operation on tensors of two devices raises an error.

Unlike torch's FakeTensorMode it has values, so that whatever runs on it takes every branch, and must find what it finds
on the CPU. As on real accelerators, a number (a tensor without dimensions) and the indices of a tensor may come from
the host.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.backend_registration import (
    _DummyBackendModule,
    _DummyPrivateUse1Hook,
    _setup_privateuseone_for_python_backend,
)

NAME = "fakegpu"
_COPIES = ("aten::_to_copy", "aten::copy_")  # from one device to the other
_INDEXING = ("aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_")


class TwoDevices(RuntimeError):
    """An operation got tensors of two devices."""


class _State:
    is_there = False
    has_f64 = True


class _Module(_DummyBackendModule):
    def is_available(self) -> bool:
        return _State.is_there

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]


class _Hook(_DummyPrivateUse1Hook):
    def is_available(self) -> bool:
        return _State.is_there


class FakeGpuTensor(torch.Tensor):
    """A tensor on the made-up accelerator; `raw` is its twin on the CPU, which shares memory as it would."""

    raw: torch.Tensor

    @staticmethod
    def __new__(cls, raw: torch.Tensor) -> "FakeGpuTensor":
        if raw.dtype == torch.float64 and not _State.has_f64:
            raise TypeError("the made-up accelerator has no f64")
        made: FakeGpuTensor = torch.Tensor._make_wrapper_subclass(
            cls,
            raw.size(),
            strides=raw.stride(),
            storage_offset=raw.storage_offset(),
            dtype=raw.dtype,
            device=torch.device(NAME, 0),
        )
        made.raw = raw
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        return _run(func, args, kwargs or {})

    def __repr__(self, *_: object, **__: object) -> str:  # type: ignore[override]
        return f"FakeGpuTensor({self.raw})"

    def tolist(self) -> Any:
        return self.raw.tolist()

    def __deepcopy__(self, memo: dict[int, Any]) -> "FakeGpuTensor":
        if id(self) not in memo:
            made = FakeGpuTensor(self.raw.detach().clone()).requires_grad_(self.requires_grad)
            made._is_param = isinstance(self, torch.nn.Parameter)
            memo[id(self)] = made
        found: FakeGpuTensor = memo[id(self)]
        return found

    def data_ptr(self) -> int:
        return self.raw.data_ptr()

    def untyped_storage(self) -> torch.UntypedStorage:
        return self.raw.untyped_storage()

    @property
    def data(self) -> torch.Tensor:
        return self.detach()

    @data.setter
    def data(self, value: torch.Tensor) -> None:
        torch.Tensor.data.__set__(self, value)  # type: ignore[attr-defined]
        assert isinstance(value, FakeGpuTensor)
        self.raw = value.raw


class _Mode(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        asked = kwargs.get("device")
        if FakeGpuTensor not in types and (asked is None or torch.device(asked).type != NAME):
            return func(*args, **kwargs)  # of the host alone
        return _run(func, args, kwargs)


_setup_privateuseone_for_python_backend(NAME, backend_module=_Module(), hook=_Hook())


@contextmanager
def fake_gpu(*, has_f64: bool = True) -> Iterator[torch.device]:
    """Give torch the made-up accelerator while the context is entered."""
    _State.is_there, _State.has_f64 = True, has_f64
    torch._C._set_only_lift_cpu_tensors(True)  # so that torch.tensor comes here too
    try:
        # An error in another thread would end the process.
        with _Mode(), torch.autograd.set_multithreading_enabled(False):  # type: ignore[no-untyped-call]
            yield torch.device(NAME, 0)
    finally:
        torch._C._set_only_lift_cpu_tensors(False)
        _State.is_there, _State.has_f64 = False, True


def _run(func: Callable[..., Any], args: Any, kwargs: Mapping[str, Any]) -> Any:
    name = func._schema.name  # type: ignore[attr-defined]
    tensors = [one for one in pytree.tree_leaves((args, kwargs)) if isinstance(one, torch.Tensor)]
    ours = [one for one in tensors if isinstance(one, FakeGpuTensor)]
    asked = kwargs.get("device")
    there = bool(ours) if asked is None else torch.device(asked).type == NAME
    if name in _INDEXING:
        _require_one_device(name, [args[0], *args[2:3]])
        if not isinstance(args[0], FakeGpuTensor) and ours:
            raise TwoDevices(f"{name}: a tensor of the host with indices of {NAME}")
    elif name not in _COPIES:
        _require_one_device(name, tensors)
    generator = kwargs.get("generator")
    if there and isinstance(generator, torch.Generator):
        raise TwoDevices(f"{name}: a generator of the host draws for {NAME}")
    if name == "aten::copy_":
        there = isinstance(args[0], FakeGpuTensor)
    twins = {id(one.raw): one for one in ours}
    plain_args, plain = pytree.tree_map_only(FakeGpuTensor, lambda one: one.raw, (args, dict(kwargs)))
    if asked is not None:
        plain["device"] = torch.device("cpu")
    if name == "aten::histc" and not plain_args[0].is_floating_point():  # as accelerators count them, and the CPU not
        found = func(plain_args[0].float(), *plain_args[1:], **plain).to(plain_args[0].dtype)
    else:
        found = func(*plain_args, **plain)

    def wrapped(one: torch.Tensor) -> torch.Tensor:
        if not there:
            return one
        return twins[id(one)] if id(one) in twins else FakeGpuTensor(one)

    return pytree.tree_map_only(torch.Tensor, wrapped, found)


def _require_one_device(name: str, tensors: list[Any]) -> None:
    kinds = {isinstance(one, FakeGpuTensor) for one in tensors if isinstance(one, torch.Tensor) and one.dim()}
    if len(kinds) > 1:
        shapes = [(one.device.type, tuple(one.shape)) for one in tensors if isinstance(one, torch.Tensor)]
        raise TwoDevices(f"{name} got tensors of two devices: {shapes}")
