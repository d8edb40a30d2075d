"""A report on how TensorRT for RTX compiles a model, made without a GPU."""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from operator import itemgetter
from pathlib import Path
from typing import Any

from dilap.backends.tensorrt import builder as tensorrt_build
from dilap.backends.tensorrt.builder import PhaseSummary
from dilap.backends.tensorrt.recipe import Profile, Recipe
from dilap.core.codec import decode, encode
from dilap.core.errors import DilapError, Unsupported
from dilap.core.numerics import LayerNumerics, Numerics
from dilap.core.shape import Architecture, LayerWidths


@dataclass(frozen=True, kw_only=True)
class CompiledTarget:
    """The model compiled for one GPU generation; `reason` says why it could not be built."""

    target: str
    built: bool
    reason: str = ""
    seconds: float = 0.0
    engine_bytes: int = 0
    phases: tuple[PhaseSummary, ...] = ()


@dataclass(frozen=True, kw_only=True)
class CompileReport:
    """What TensorRT for RTX made of a model.

    The whole file was parsed. Of a decoder's `num_layers`, one of every width was built; an image network, for which
    both numbers are 0, was built as a whole.
    """

    runtime: str
    files: dict[str, str]
    parsed: bool
    num_layers: int
    num_layers_built: int
    targets: tuple[CompiledTarget, ...]

    def describe(self) -> str:
        """Return the report in one line."""
        built = [one for one in self.targets if one.built]
        failed = [f"{one.target}: {one.reason}" for one in self.targets if not one.built]
        unfused = sorted({node for one in built for phase in one.phases for node in phase.unfused_attention})
        text = f"compiled by {self.runtime} for {', '.join(one.target for one in built) or 'no target'}"
        if unfused:
            text += f"; attention that is not one kernel: {', '.join(unfused)}"
        elif any(phase.fused_attention for one in built for phase in one.phases):
            text += "; all attention fused"
        return text + "".join(f"; failed for {reason}" for reason in failed)


def compiled(whole: Path, shallow: Path, *, recipe: Mapping[str, Any], targets: Sequence[str]) -> dict[str, Any]:
    """Parse the file `whole`, build `shallow` for every GPU generation, and return a CompileReport as JSON values.

    `recipe` is the shallow model's Recipe as JSON values, because this function runs in a process of its own (TensorRT
    is native code). Raises Unavailable without TensorRT, Unsupported for one that builds for this machine's GPU only.
    """
    api = _rtx()
    tensorrt_build.parse(whole, api=api)
    profiles = decode(Recipe, recipe, source="the recipe").profiles()
    return _report(api, [_compile_for(shallow, profiles, api, target) for target in targets])


def compiled_network(path: Path, *, targets: Sequence[str]) -> dict[str, Any]:
    """Build an image network for every GPU generation, as `compiled` does; raises what that raises."""
    api = _rtx()
    tensorrt_build.parse(path, api=api)
    return _report(api, [_compile_for(path, (), api, target) for target in targets])


def _rtx() -> tensorrt_build.Api:
    api = tensorrt_build.find_api()
    if not api.for_rtx:
        raise Unsupported(f"{api.version} builds for this machine's GPU only")
    return api


def _report(api: tensorrt_build.Api, built: Sequence[CompiledTarget]) -> dict[str, Any]:
    """Return a report as JSON values, without the facts of the model."""
    report = CompileReport(
        runtime=api.version, files={}, parsed=True, num_layers=0, num_layers_built=0, targets=tuple(built)
    )
    return encode(report)


def _compile_for(path: Path, profiles: Sequence[Profile], api: tensorrt_build.Api, target: str) -> CompiledTarget:
    """Build the model in `path` for one GPU generation; a failure is part of the result."""
    try:
        built = tensorrt_build.build(path, profiles, api=api, target=target)
    except DilapError as error:
        return CompiledTarget(target=target, built=False, reason=str(error))
    return CompiledTarget(
        target=target,
        built=True,
        seconds=round(built.seconds, 1),
        engine_bytes=built.num_bytes,
        phases=tensorrt_build.summarise(
            built.layers,
            [profile.phase for profile in profiles] or ["forward"],
            activation_bytes=built.activation_bytes,
        ),
    )


def one_layer_a_width(architecture: Architecture, numerics: Numerics) -> tuple[Architecture, Numerics]:
    """Return the model with just enough layers that every width of attention and of FFN occurs.

    Layers of equal widths and numerics get equal kernels, and a builder takes minutes for thirty layers.
    """
    pairs = zip(architecture.layers, numerics.layers, strict=True)
    attention = list(dict.fromkeys((layer.num_heads, layer.num_kv_heads, own) for layer, own in pairs))
    ffn = list(dict.fromkeys(layer.num_channels for layer in architecture.layers))
    attention.sort(key=itemgetter(0, 1), reverse=True)
    ffn.sort()  # narrow FFNs meet wide attention, so that hardly a layer lacks both
    found: list[tuple[LayerWidths, LayerNumerics]] = []
    for heads, channels in itertools.zip_longest(attention, ffn):
        num_heads, num_kv_heads, own = attention[0] if heads is None else heads
        width = ffn[-1] if channels is None else channels
        found.append((LayerWidths(num_heads=num_heads, num_kv_heads=num_kv_heads, num_channels=width), own))
    layers, values = zip(*(one for one in found if not one[0].is_empty), strict=True)
    return replace(architecture, layers=layers), replace(numerics, layers=values)
