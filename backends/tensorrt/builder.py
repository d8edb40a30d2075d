"""TensorRT's builder: the same code builds engines on a Jetson and checks on any machine that they can be built.

An engine is bound to its TensorRT version and GPU, so it is built where it runs. TensorRT for RTX has the same parser,
builder and profiles, and compiles for a named GPU generation without a GPU: that is the check. The differences between
TensorRT 10.3 (JetPack 6), 10.16 (JetPack 7.2), 11 and TensorRT for RTX are handled in `Api` and nowhere else:

    strong typing        a creation flag in 10, the only way in 11 (where the flag is gone or without effect)
    timing cache         TensorRT for RTX times nothing when it builds: it has none
    target               TensorRT for RTX takes compute capabilities, TensorRT builds for the GPU that is there
    device memory        `device_memory_size_v2` since 10.1
    inspector's JSON     not needed: layers are read from `Layers`, the same key everywhere
"""

import collections
import functools
import importlib
import json
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dilap.backends.tensorrt.recipe import Profile
from dilap.core.codec import written_aside
from dilap.core.errors import InvalidInput, Unavailable, Unsupported, reason_of
from dilap.core.workload import Phase

# Ampere for data centres; the generation of Jetson Orin (itself SM87, which TensorRT for RTX does not know); Ada.
CHECKED_TARGETS = ("SM80", "SM86", "SM89")
_OLDEST = (10, 3)
_MODULES = ("tensorrt", "tensorrt_rtx", "tensorrt_rtx_bindings")
_LAYER = re.compile(r"Name: (?P<name>.*?), LayerType: (?P<kind>[^,]*), ")
_ONNX_NODE = re.compile(r"\[ONNX Layer: ([^\]]*)\]")
_PROFILE = re.compile(r"\[profile (\d+)\]")
_SUBGRAPH = re.compile(r"_(myl\d+)_\d+$")
_ACTIVATIONS = re.compile(r"Total Activation Memory: (\d+) bytes")


@dataclass(frozen=True)
class Api:
    """One of TensorRT's Python modules, with what differs between them."""

    module: Any

    @property
    def for_rtx(self) -> bool:
        return hasattr(self.module, "ComputeCapability")

    @property
    def version(self) -> str:
        return f"{'TensorRT for RTX' if self.for_rtx else 'TensorRT'} {self.module.__version__}"

    @property
    def network_flags(self) -> int:
        flag = getattr(self.module.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
        return 0 if flag is None else 1 << int(flag)

    def set_target_(self, config: Any, target: str) -> None:
        """Let `config` build for a GPU generation, such as SM86; no such GPU need be here. Raises Unsupported."""
        capability = getattr(self.module.ComputeCapability, target, None) if self.for_rtx else None
        if capability is None:
            raise Unsupported(f"{self.version} cannot build for {target} on another machine")
        config.num_compute_capabilities = 1
        config.set_compute_capability(capability, 0)

    def timing_cache_(self, config: Any, stored: bytes) -> None:
        """Give the builder what earlier builds measured, or an empty cache if that was another version or GPU."""
        if self.for_rtx:
            return
        if not config.set_timing_cache(config.create_timing_cache(stored), ignore_mismatch=False):
            config.set_timing_cache(config.create_timing_cache(b""), ignore_mismatch=False)

    def device_memory_bytes(self, engine: Any) -> int:
        """Return the device memory that an execution needs beside weights, inputs and outputs."""
        return int(engine.device_memory_size_v2)


@functools.cache
def find_api(modules: tuple[str, ...] = _MODULES) -> Api:
    """Return the first of TensorRT's modules that can be used here. Raises Unavailable."""
    reasons = []
    for name in modules:
        try:
            api = Api(importlib.import_module(name))
        except ModuleNotFoundError:  # noqa: PERF203  (three names)
            continue
        except (ImportError, OSError, RuntimeError) as error:  # installed, but a library is missing
            reasons.append(f"{name}: {reason_of(error)}")
        else:
            if api.for_rtx or _numbers(api.module.__version__) >= _OLDEST:
                return api
            reasons.append(f"{api.version} is older than 10.3, which JetPack 6.1 has")
    why = f" ({'; '.join(reasons)})" if reasons else ""
    raise Unavailable(
        f"TensorRT's Python module is not usable here{why}; on a Jetson: apt-get install python3-libnvinfer; elsewhere "
        "pip install 'dilap[tensorrt]' checks builds without a GPU"
    )


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".")[:2])


@dataclass(frozen=True, kw_only=True)
class Layer:
    """One layer of an engine; `nodes` are the ONNX nodes that went into it, `profile` the profile's index."""

    name: str
    kind: str
    nodes: tuple[str, ...]
    profile: int


@dataclass(frozen=True, kw_only=True)
class Built:
    """A serialised engine. `activation_bytes` has one number per profile, where the builder told them."""

    plan: Any
    num_bytes: int
    seconds: float
    layers: tuple[Layer, ...] = ()
    activation_bytes: tuple[int, ...] = ()


@dataclass(frozen=True, kw_only=True)
class PhaseSummary:
    """An engine's layers in one phase.

    `fused_attention` counts the softmax nodes whose attention became one kernel, `unfused_attention` names the others.
    `joined` are the matrices that TensorRT multiplies together (q, k and v; gate and up), which TensorRT 10.13 silently
    did wrongly at batch 1.
    """

    phase: Phase
    num_layers: int
    kinds: dict[str, int]
    fused_attention: int
    unfused_attention: tuple[str, ...]
    joined: tuple[str, ...]
    activation_bytes: int | None = None


@dataclass
class _Log:
    """The builder's messages: its errors, and the lines that describe the layers that it made."""

    errors: list[str] = field(default_factory=list)
    lines: list[str] = field(default_factory=list)

    def add(self, text: str, *, is_error: bool) -> None:
        if is_error:
            self.errors.append(text)
        elif text.startswith(("Engine Layer Information", "Layers:", "Name: ")) or "Total Activation Memory" in text:
            self.lines.extend(text.splitlines())

    def reason(self) -> str:
        return next(iter(self.errors), "it gave no reason").splitlines()[0]


def _logger(api: Api, log: _Log) -> Any:
    """Return a logger that writes into `log`. Its class is made here, as its base class comes with TensorRT."""
    severe = (api.module.ILogger.Severity.ERROR, api.module.ILogger.Severity.INTERNAL_ERROR)

    class Logger(api.module.ILogger):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            api.module.ILogger.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            log.add(message, is_error=severity in severe)

    return Logger()


def parse(onnx: Path, *, api: Api) -> None:
    """Check that TensorRT's parser accepts the whole file. Raises InvalidInput."""
    _Parsed(onnx, api)


class _Parsed:
    """A network read from an ONNX file, with its builder and parser, which must live as long as the network."""

    def __init__(self, onnx: Path, api: Api) -> None:
        self.log = _Log()
        self._logger = _logger(api, self.log)
        self.builder = api.module.Builder(self._logger)
        self.network = self.builder.create_network(api.network_flags)
        self._parser = api.module.OnnxParser(self.network, self._logger)
        if not self._parser.parse_from_file(str(onnx)):
            raise InvalidInput(f"{onnx}: {api.version} cannot parse it: {_parse_error(self._parser)}")


def build(
    onnx: Path, profiles: Sequence[Profile], *, api: Api, target: str | None = None, timing_cache: Path | None = None
) -> Built:
    """Build an engine for the GPU that is here, or for the generation `target` with TensorRT for RTX.

    Raises InvalidInput where the file cannot be parsed, Unsupported where no engine can be built.
    """
    start = time.perf_counter()
    parsed = _Parsed(onnx, api)
    config = _config(parsed, profiles, api)
    if target is not None:
        api.set_target_(config, target)
    elif timing_cache is not None:
        api.timing_cache_(config, timing_cache.read_bytes() if timing_cache.exists() else b"")
    plan = parsed.builder.build_serialized_network(parsed.network, config)
    if plan is None:
        raise Unsupported(f"{onnx}: {api.version} cannot build it: {parsed.log.reason()}")
    if timing_cache is not None and not api.for_rtx:
        _keep_timings(config, timing_cache)
    lines = parsed.log.lines
    return Built(
        plan=plan,
        num_bytes=plan.nbytes,
        seconds=time.perf_counter() - start,
        layers=layers_of_log(lines),
        activation_bytes=tuple(int(found[1]) for line in lines if (found := _ACTIVATIONS.search(line))),
    )


def _parse_error(parser: Any) -> str:
    if not parser.num_errors:
        return "it gave no reason"
    error = parser.get_error(0)
    return f"{error.node_operator()} {error.node_name()}: {error.desc()}".splitlines()[0]


def _config(parsed: _Parsed, profiles: Sequence[Profile], api: Api) -> Any:
    config = parsed.builder.create_builder_config()
    config.profiling_verbosity = api.module.ProfilingVerbosity.DETAILED  # else layers do not say what they hold
    for one in profiles:
        profile = parsed.builder.create_optimization_profile()
        for index in range(parsed.network.num_inputs):
            tensor = parsed.network.get_input(index)
            if tensor.name not in one.inputs:
                raise InvalidInput(f"the recipe has no shape for the model's input {tensor.name}")
            span = one.inputs[tensor.name]
            set_range = profile.set_shape_input if tensor.is_shape_tensor else profile.set_shape
            set_range(tensor.name, span.minimum, span.optimum, span.maximum)
        if config.add_optimization_profile(profile) < 0:
            raise Unsupported(f"{api.version} refuses the {one.phase} profile: {parsed.log.reason()}")
    return config


def _keep_timings(config: Any, path: Path) -> None:
    with written_aside(path) as temporary:
        temporary.write_bytes(bytes(config.get_timing_cache().serialize()))


def layers_of_log(lines: Sequence[str]) -> tuple[Layer, ...]:
    """Return the layers in the builder's log (`Name: X, LayerType: Y, ..., Metadata: [ONNX Layer: Z]...`)."""
    matches = ((line, _LAYER.match(line)) for line in lines)
    return _layers([(found["name"], found["kind"], line) for line, found in matches if found])


def layers_of_inspector(text: str) -> tuple[Layer, ...]:
    """Return the layers in the engine inspector's JSON; an engine built without detail has names alone."""
    found = json.loads(text).get("Layers", [])
    described = [one if isinstance(one, dict) else {"Name": one} for one in found]
    return _layers([(one["Name"], one.get("LayerType", "unknown"), json.dumps(one)) for one in described])


def _layers(described: Sequence[tuple[str, str, str]]) -> tuple[Layer, ...]:
    """Return the layers from (name, kind, the whole description) of each.

    Only some layers of a compiled subgraph name their profile; the others have the same, as a subgraph has only one.
    """
    profiles: dict[str, int] = collections.defaultdict(int)
    for name, _, text in described:
        mentioned = (int(index) for index in _PROFILE.findall(text))
        profiles[_subgraph(name)] = max(profiles[_subgraph(name)], *mentioned, 0)
    return tuple(
        Layer(name=name, kind=kind, nodes=tuple(_ONNX_NODE.findall(text)), profile=profiles[_subgraph(name)])
        for name, kind, text in described
    )


def _subgraph(name: str) -> str:
    """Return the subgraph that a layer belongs to if its name ends in `_myl<subgraph>_<layer>`, else its name."""
    found = _SUBGRAPH.search(name)
    return found[1] if found else name


def inspect(engine: Any, *, api: Api) -> tuple[Layer, ...]:
    """Return the layers of an engine that is open on its GPU."""
    text: str = engine.create_engine_inspector().get_engine_information(api.module.LayerInformationFormat.JSON)
    return layers_of_inspector(text)


def summarise(
    all_layers: Sequence[Layer], phases: Sequence[Phase], *, activation_bytes: Sequence[int] = ()
) -> tuple[PhaseSummary, ...]:
    """Return a summary of the layers for every phase, in the order of the engine's profiles."""
    found = []
    for index, phase in enumerate(phases):
        layers = [layer for layer in all_layers if layer.profile == index]
        softmax = {
            node: sum("MatMul" in other for other in layer.nodes) >= 2  # queries by keys, and weights by values
            for layer in layers
            for node in layer.nodes
            if "Softmax" in node
        }
        memory = activation_bytes[index] if index < len(activation_bytes) else None
        found.append(
            PhaseSummary(
                phase=phase,
                num_layers=len(layers),
                kinds=dict(sorted(collections.Counter(layer.kind for layer in layers).items())),
                fused_attention=sum(softmax.values()),
                unfused_attention=tuple(sorted(node for node, fused in softmax.items() if not fused)),
                joined=tuple(_plain(layer.name) for layer in layers if "+" in layer.name),
                activation_bytes=memory,
            )
        )
    return tuple(found)


def _plain(name: str) -> str:
    """Return a layer's name without profile and subgraph."""
    return _SUBGRAPH.sub("", _PROFILE.sub("", name).replace(" ", ""))
