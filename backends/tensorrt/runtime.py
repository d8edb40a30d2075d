"""TensorRT on a Jetson's GPU: engines are built there from ONNX files, compared with torch once, and kept.

An engine lies in `engines/` beside its model, with a sidecar file that says for which model content, shapes, TensorRT
version and GPU it was built; for any others a new engine is built. What TensorRT measures while it builds is kept in
the user's cache folder, so that the next build of a similar model is quick.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dilap.backends import Session
from dilap.backends.inputs import require_batch
from dilap.backends.tensorrt import builder as tensorrt_build
from dilap.backends.tensorrt import cuda, trtexec
from dilap.backends.tensorrt.builder import Api, PhaseSummary
from dilap.backends.tensorrt.network import EngineNetwork
from dilap.backends.tensorrt.recipe import (
    MAX_TOKENS,
    AnyRecipe,
    NetworkRecipe,
    Profile,
    Recipe,
    read_network_recipe,
    read_recipe,
)
from dilap.backends.tensorrt.session import EngineSession
from dilap.core import codec
from dilap.core.errors import InvalidInput, Unavailable, Unsupported, VerificationFailed
from dilap.core.rules import Capabilities, NetworkCapabilities
from dilap.core.shape import Architecture
from dilap.core.sqnr import sqnr_db
from dilap.core.workload import Phase, Workload

_PRECISIONS = ("f16", "bf16")
_NETWORK_PRECISIONS = ("f16", "int8")
_CACHE = Path(".cache") / "dilap"  # in the user's home


@dataclass(frozen=True, kw_only=True)
class EngineSidecar:
    """What an engine was built from and for, and what TensorRT made of the model.

    `sqnr_db` is its SQNR against torch, None where it was not compared (a probe, or a device with trtexec alone).
    """

    key: str
    files: dict[str, str]
    runtime: str
    gpu: str
    profiles: tuple[Profile, ...]
    phases: tuple[PhaseSummary, ...]
    device_memory_bytes: int | None
    sqnr_db: float | None


class TensorRT:
    """Runs ONNX files by means of engines that are built on the device."""

    name = "tensorrt"
    format = "onnx"
    load_seconds = trtexec.BUILD_SECONDS + 300.0  # the first load builds the engine
    shares_threads = False
    lossy_switches: frozenset[str] = frozenset()

    def unavailable(self) -> str | None:
        try:
            cuda.load()
            self.version()
        except Unavailable as error:
            return f"TensorRT is not usable here: {error}"
        return None

    def version(self) -> str:
        """Return the Python module's version, or that of the package of trtexec, which does not tell its own."""
        try:
            return tensorrt_build.find_api().version
        except Unavailable:
            if trtexec.find() is None:
                raise
            return f"TensorRT through trtexec {_package_version()}"

    def build(self) -> str:
        return cuda.load().gpu()

    def precisions(self) -> tuple[str, ...]:
        return _PRECISIONS

    def network_precisions(self) -> tuple[str, ...]:
        return _NETWORK_PRECISIONS

    def switches(self) -> Mapping[str, tuple[str, ...]]:
        """Return none: TensorRT's builder tries the kernels itself."""
        return {}

    def how_to_run(self, file: str, workload: Workload) -> dict[str, str]:  # noqa: ARG002
        return {"trtexec": f"trtexec --onnx={file}, with the shapes and precisions of recipe.json"}

    def cache_bits(self, workload: Workload) -> float:  # noqa: ARG002  (as the weights, in f16 and bf16 alike)
        return 16.0

    def after_a_crash(self) -> str:
        return "look at the device with: dilap-profile --check"

    def capabilities(self, architecture: Architecture, *, precision: str) -> Capabilities:
        if precision not in _PRECISIONS:
            raise InvalidInput(f"TensorRT precision {precision!r} is unknown; use {', '.join(_PRECISIONS)}")
        if architecture.experts is not None:
            return Capabilities(unsupported="standard ONNX has no operator that computes only a token's own experts")
        # 8: tensor cores multiply blocks of 8 x 8 f16 or bf16; other widths run, padded or on slower kernels
        return Capabilities(ffn_multiple=8, mixed_precisions=False, max_tokens=MAX_TOKENS)

    def network_capabilities(self, *, precision: str) -> NetworkCapabilities:
        # tensor cores multiply blocks of 16 bytes: 8 channels in f16; in 8 bits, channels lie in vectors of 32
        return NetworkCapabilities(
            channel_multiple=32 if precision == "int8" else 8,
            unsupported_texts="DiLAP writes no encoders of texts for TensorRT yet; use onnxruntime or executorch",
        )

    def load(self, path: Path, workload: Workload) -> Session:
        """Open the model's engine for the workload; where there is none yet, build it and compare it with torch first.

        Raises VerificationFailed where the engine does not compute what torch does; such an engine is not kept.
        """
        if not path.is_file():
            raise InvalidInput(f"{path}: no such file")
        recipe, profiles = _recipe(path, workload)
        recipe.require_files(path.parent)
        job = _Job(path=path, recipe=recipe, profiles=profiles, workload=workload, runtime=self.version())
        try:
            api = tensorrt_build.find_api()
        except Unavailable:
            return job.through_trtexec()
        return job.through_python(api)


@dataclass(frozen=True, kw_only=True)
class _Job:
    """Opens the engine of one model under one workload on this device, and builds it where there is none."""

    path: Path
    recipe: Recipe | NetworkRecipe
    profiles: tuple[Profile, ...]
    workload: Workload
    runtime: str

    def through_python(self, api: Api) -> Session:
        device = cuda.load()
        engine_file, sidecar = self._files(device.gpu())
        runtime = api.module.Runtime(api.module.Logger(api.module.Logger.ERROR))
        if sidecar.exists():
            plan = engine_file.read_bytes()
            engine = _deserialised(runtime, plan, engine_file)
            return self._session(engine, device, len(plan) + api.device_memory_bytes(engine))
        cache = _timing_cache(self.runtime, device.gpu())
        built = tensorrt_build.build(self.path, self.profiles, api=api, timing_cache=cache)
        engine = _deserialised(runtime, built.plan, engine_file)
        session = self._session(engine, device, built.num_bytes + api.device_memory_bytes(engine))
        compared = compare(session, self.path.parent, self.recipe)
        with codec.written_aside(engine_file) as temporary:
            temporary.write_bytes(memoryview(built.plan))
        self._bind(sidecar, device.gpu(), engine=engine, api=api, compared=compared)
        return session

    def through_trtexec(self) -> Session:
        """Use the program trtexec. It gives no logits, so the engine is not compared, and its sidecar says so."""
        if isinstance(self.recipe, NetworkRecipe):
            raise Unsupported("image networks need TensorRT's Python module: apt-get install python3-libnvinfer")
        gpu = cuda.load().gpu()
        engine_file, sidecar = self._files(gpu)
        if not sidecar.exists():
            cache = _timing_cache(self.runtime, gpu)
            trtexec.build(self.path, self.profiles, engine=engine_file, timing_cache=cache)
            self._bind(sidecar, gpu)
        return trtexec.TrtexecSession(engine_file, self.recipe, self.profiles, self.workload)

    def _files(self, gpu: str) -> tuple[Path, Path]:
        """Return the paths of the engine and its sidecar, named by the digest of what the engine depends on."""
        key = self.recipe.engine_key(self.profiles, runtime=self.runtime, gpu=gpu)
        folder = self.path.parent / "engines"
        folder.mkdir(exist_ok=True)
        return folder / f"{key[:16]}.engine", folder / f"{key[:16]}.json"

    def _session(self, engine: Any, device: cuda.Cuda, num_bytes: int) -> EngineSession | EngineNetwork:
        """Return a session; the engine takes `num_bytes` of the GPU: those of its file, and what runs need."""
        if isinstance(self.recipe, NetworkRecipe):
            return EngineNetwork(engine, device, self.recipe, engine_bytes=num_bytes)
        return EngineSession(engine, device, self.recipe, self.profiles, self.workload, engine_bytes=num_bytes)

    def _bind(
        self, sidecar: Path, gpu: str, *, engine: Any = None, api: Api | None = None, compared: float | None = None
    ) -> None:
        """Write the sidecar. This is done last, because an engine without its sidecar is built again."""
        phases: tuple[PhaseSummary, ...] = ()
        memory = None
        if api is not None:
            layers = tensorrt_build.inspect(engine, api=api)
            names: list[Phase] = [profile.phase for profile in self.profiles]
            phases = tensorrt_build.summarise(layers, names or ["forward"])
            memory = api.device_memory_bytes(engine)
        bound = EngineSidecar(
            key=self.recipe.engine_key(self.profiles, runtime=self.runtime, gpu=gpu),
            files=self.recipe.files,
            runtime=self.runtime,
            gpu=gpu,
            profiles=self.profiles,
            phases=phases,
            device_memory_bytes=memory,
            sqnr_db=compared,
        )
        codec.write_json(sidecar, codec.encode(bound))


def _recipe(path: Path, workload: Workload) -> tuple[Recipe | NetworkRecipe, tuple[Profile, ...]]:
    """Return a model's recipe and the profiles for a workload; a network's shape is fixed and needs none."""
    if workload.phase != "forward":
        recipe = read_recipe(path.parent)
        return recipe, recipe.profiles(workload)
    network = read_network_recipe(path.parent)
    require_batch(path, network.shape, workload)
    return network, ()


def compare(session: EngineSession | EngineNetwork, folder: Path, recipe: AnyRecipe) -> float | None:
    """Return the SQNR in dB against torch's logits in the folder: the worse of one pass and of decoding by token.

    TensorRT has compiled models wrongly without an error (10.13 joined q, k and v wrongly at batch 1), so no engine of
    a real model is used unchecked. Returns None for probes, which have nothing to be compared with. Raises
    VerificationFailed below the recipe's bound.
    """
    if recipe.reference is None:
        return None
    if isinstance(session, EngineNetwork):
        return _compare_network(session, folder / recipe.reference, recipe)
    with np.load(folder / recipe.reference, allow_pickle=False) as stored:
        token_ids, expected = [int(token) for token in stored["token_ids"]], stored["logits"]
    together, one_by_one = (
        sqnr_db(expected, session.logits(token_ids, incremental=incremental)) for incremental in (False, True)
    )
    worst = min(together, one_by_one)
    if not worst >= recipe.bound_db:
        raise VerificationFailed(
            f"the TensorRT engine differs from the torch model: SQNR {together:.1f} dB in one pass, {one_by_one:.1f} dB"
            f" token by token; {recipe.bound_db:g} dB expected. TensorRT miscompiled it: try --precision bf16, or"
            " a JetPack with another TensorRT"
        )
    return worst


def _compare_network(network: EngineNetwork, reference: Path, recipe: AnyRecipe) -> float:
    with np.load(reference, allow_pickle=False) as stored:
        found = sqnr_db(stored["logits"], network.outputs(stored["images"]))
    if not found >= recipe.bound_db:
        raise VerificationFailed(
            f"the TensorRT engine differs from the torch model: SQNR {found:.1f} dB; {recipe.bound_db:g} dB expected."
            " TensorRT miscompiled it: try another --precision, or a JetPack with another TensorRT"
        )
    return found


def _deserialised(runtime: Any, plan: Any, path: Path) -> Any:
    engine = runtime.deserialize_cuda_engine(plan)
    if engine is None:
        raise Unsupported(f"{path}: TensorRT cannot open the engine; remove it and it is built again")
    return engine


def _timing_cache(runtime: str, gpu: str) -> Path:
    name = "".join(letter if letter.isalnum() or letter in ".-" else "_" for letter in f"{runtime}-{gpu}")
    folder = Path.home() / _CACHE
    folder.mkdir(parents=True, exist_ok=True)
    return folder / f"{name}.timings"


def _package_version() -> str:
    """Return the version of the Debian package that trtexec comes from; an engine depends on it."""
    status = Path("/var/lib/dpkg/status")
    text = status.read_text(encoding="utf-8", errors="replace") if status.exists() else ""
    return package_version(text, "libnvinfer-bin")


def package_version(status: str, package: str) -> str:
    """Return the version of an installed package from dpkg's status file; `unknown` where it is not there."""
    for paragraph in status.split("\n\n"):
        fields: Sequence[str] = paragraph.splitlines()
        if f"Package: {package}" in fields:
            return next((line.partition(": ")[2] for line in fields if line.startswith("Version: ")), "unknown")
    return "unknown"
