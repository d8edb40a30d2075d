"""What a device needs to build a TensorRT engine from an ONNX file: `recipe.json` beside the model."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TypeVar

from dilap.core import codec
from dilap.core.errors import Mismatch, Unsupported
from dilap.core.workload import Phase, Workload

T = TypeVar("T")
RECIPE_FILE = "recipe.json"
MAX_TOKENS = 2048  # most tokens of a prompt and of a context: an engine reserves memory for its largest shapes
SHAPE_INPUT = "logits_to_keep"  # the only input whose numbers decide shapes: TensorRT reads it on the host


@dataclass(frozen=True, kw_only=True)
class InputRange:
    """An input's smallest, most frequent and largest shape; for the shape input, these are values and no shapes."""

    minimum: tuple[int, ...]
    optimum: tuple[int, ...]
    maximum: tuple[int, ...]

    def __post_init__(self) -> None:
        for low, middle, high in zip(self.minimum, self.optimum, self.maximum, strict=True):
            if not 0 <= low <= middle <= high:
                raise ValueError(f"an input's range must ascend, got {self}")


@dataclass(frozen=True, kw_only=True)
class Profile:
    """The shapes that an engine takes in one phase; TensorRT tunes its kernels for the most frequent ones."""

    phase: Phase
    inputs: dict[str, InputRange]


@dataclass(frozen=True, kw_only=True)
class CacheInput:
    """One input with the keys or values of the KV cache: 1 x num_kv_heads x past tokens x head_dim."""

    name: str
    num_kv_heads: int


@dataclass(frozen=True, kw_only=True)
class AnyRecipe:
    """What the recipes of decoders and of image networks have in common.

    `files` are the SHA-256 of the ONNX file and its external data, by name. `reference` names an .npz file, read
    without pickle, with what torch computes: every new engine is compared with it on its device, and must reach an SQNR
    of `bound_db`. Probes, which are only timed, have no reference (None). `tested` says which TensorRT versions the
    format is meant for.
    """

    precision: str
    files: dict[str, str]
    reference: str | None
    bound_db: float
    tested: tuple[str, ...]

    def require_files(self, folder: Path) -> None:
        """Raise Mismatch where a file is not the one that the recipe was written for."""
        for name, sha256 in self.files.items():
            path = folder / name
            if not path.is_file() or codec.file_sha256(path) != sha256:
                raise Mismatch(
                    f"{path}: missing, or not the file that {RECIPE_FILE} was written for; copy the folder again"
                )

    def engine_key(self, profiles: tuple[Profile, ...], *, runtime: str, gpu: str) -> str:
        """Return a digest of all that an engine depends on: model content, shapes, TensorRT version and GPU."""
        document = [self.files, self.precision, [asdict(one) for one in profiles], runtime, gpu]
        return codec.digest(document)


@dataclass(frozen=True, kw_only=True)
class NetworkRecipe(AnyRecipe):
    """The recipe of an image network: one batch of the given `shape` in, logits of `num_classes` out, both in f32.

    The reference has `images` and torch's `logits`.
    """

    shape: tuple[int, ...]
    num_classes: int


@dataclass(frozen=True, kw_only=True)
class Recipe(AnyRecipe):
    """The recipe of a decoder.

    Decoding takes 1 token after 0 to `max_past` tokens, a prefill 1 to `max_prompt` tokens after none; the batch is 1.
    The reference has `token_ids` and torch's `logits`.
    """

    head_dim: int
    vocab_size: int
    cache: tuple[CacheInput, ...]
    max_past: int
    max_prompt: int

    def shapes(self, *, num_tokens: int, past: int, kept: int) -> dict[str, tuple[int, ...]]:
        """Return the shape of every input for one step; for the shape input, its values."""
        fixed = {"input_ids": (1, num_tokens), "position_ids": (1, num_tokens), SHAPE_INPUT: (kept,)}
        return fixed | {one.name: (1, one.num_kv_heads, past, self.head_dim) for one in self.cache}

    def profiles(self, workload: Workload | None = None) -> tuple[Profile, ...]:
        """Return the profiles of decode and prefill, tuned for `workload` where one is given.

        A probe's recipe, which has no reference, gives only the profile of the workload's phase, because the engines
        of probes are thrown away. Raises Unsupported for a workload beyond the recipe's limits.
        """
        work = workload or Workload()
        context, prompt = min(work.context, self.max_past), min(work.prompt_tokens, self.max_prompt)
        if workload is not None:
            self._require_room(workload)
        found: dict[Phase, Profile] = {
            "decode": self._profile("decode", (1, 0, 1), (1, context, 1), (1, self.max_past, 1)),
            "prefill": self._profile("prefill", (1, 0, 1), (prompt, 0, 1), (self.max_prompt, 0, self.max_prompt)),
        }
        # Every profile keeps its own copy of the matrices, laid out for its kernels (TensorRT for RTX 1.7, 26.2 MB of
        # weights: 29.5 MB with the decode profile, 29.8 MB with the prefill one, 57.7 MB with both). One profile over
        # both phases would be tuned for only one of them.
        if workload is not None and self.reference is None:
            return (found[workload.phase],)
        return tuple(found.values())

    def _profile(self, phase: Phase, *steps: tuple[int, int, int]) -> Profile:
        """Return a profile from the (tokens, past, kept) of its smallest, most frequent and largest step."""
        low, middle, high = (self.shapes(num_tokens=new, past=past, kept=kept) for new, past, kept in steps)
        ranges = {name: InputRange(minimum=low[name], optimum=middle[name], maximum=high[name]) for name in low}
        return Profile(phase=phase, inputs=ranges)

    def _require_room(self, workload: Workload) -> None:
        if workload.batch != 1:
            raise Unsupported(f"TensorRT is timed with batch 1, got batch {workload.batch}")
        if workload.phase == "decode" and workload.context > self.max_past:
            raise Unsupported(f"the engine decodes after at most {self.max_past} tokens, got {workload.context}")
        if workload.phase == "prefill" and workload.prompt_tokens > self.max_prompt:
            raise Unsupported(
                f"the engine takes prompts of at most {self.max_prompt} tokens, got {workload.prompt_tokens}"
            )


def read_recipe(folder: Path) -> Recipe:
    """Read the recipe in a decoder's folder. Raises InvalidInput where it is absent, damaged or a network's."""
    return _read(Recipe, folder)


def read_network_recipe(folder: Path) -> NetworkRecipe:
    """Read the recipe in an image network's folder. Raises InvalidInput where it is absent, damaged or a decoder's."""
    return _read(NetworkRecipe, folder)


def _read(kind: type[T], folder: Path) -> T:
    path = folder / RECIPE_FILE
    return codec.decode(kind, codec.read_json(path), source=str(path))
