"""What llama.cpp's architectures of Gemma take beside the keys and tensors of other families, and what they refuse."""

from dataclasses import dataclass

from dilap.core.errors import Unsupported
from dilap.core.numerics import Numerics
from dilap.core.shape import Architecture
from dilap.models.families import gemma2, gemma3_text
from dilap.models.families.gemma2 import Gemma as Family

Metadata = dict[str, str | int | float | list[int]]


@dataclass(frozen=True, kw_only=True)
class Gemma:
    """One of llama.cpp's two architectures of Gemma."""

    name: str
    family: Family

    def metadata(self, numerics: Numerics) -> Metadata:
        """Return the keys that other families do not have."""
        found: Metadata = {}
        if not self._has_usual_pattern(numerics):
            found["attention.sliding_window_pattern"] = [int(layer.window is not None) for layer in numerics.layers]
        for layer in numerics.layers:
            assert layer.rotary is not None
            if layer.window is not None:
                found |= {"attention.sliding_window": layer.window, "rope.freq_base_swa": layer.rotary.base}
            elif layer.rotary.kind == "linear":
                found |= {"rope.scaling.type": "linear", "rope.scaling.factor": 1 / layer.rotary.frequencies[0]}
        caps = {"attn": numerics.attention_softcap, "final": numerics.logits_softcap}
        return found | {f"{name}_logit_softcapping": cap for name, cap in caps.items() if cap is not None}

    def notes(self, numerics: Numerics) -> tuple[str, ...]:
        """Return what a reader must know of the file."""
        if self._has_usual_pattern(numerics):
            return ()
        return (
            f"the key {self.name}.attention.sliding_window_pattern says which layers slide: llama.cpp reads it in "
            "llama-cpp-python 0.3.36, and may pass over it without a word in older versions",
        )

    def _has_usual_pattern(self, numerics: Numerics) -> bool:
        slides = [layer.window is not None for layer in numerics.layers]
        return not any(slides) or slides == self.family.slides(len(slides))

    def query_factor(self, architecture: Architecture, numerics: Numerics) -> float:
        """Return the factor of queries that makes llama.cpp's scale of attention the model's."""
        size = self.family.scaled_size(
            num_layers=len(architecture.layers),
            hidden_size=architecture.hidden_size,
            num_heads=architecture.layers[0].num_heads,
            head_dim=architecture.head_dim,
        )
        factor: float = numerics.attention_scale * size**0.5
        return factor

    def stream_factor(self, architecture: Architecture, numerics: Numerics) -> float:
        """Return the factor of all that is added to embeddings, because llama.cpp scales these by an exact root.

        A model in half precision scales them by a rounded one. Only norms read the sum, whatever its factor.
        """
        exact: float = architecture.hidden_size**0.5
        return exact / numerics.embedding_scale

    def require(self, architecture: Architecture, numerics: Numerics) -> None:
        """Raise Unsupported, with the reason, for what llama.cpp does not compute."""
        if self.name == "gemma2" and not architecture.tied_embeddings:
            raise Unsupported("llama.cpp holds Gemma 2 only with a head that is its embedding; use another backend")
        if self.name == "gemma2" and None in (numerics.attention_softcap, numerics.logits_softcap):
            raise Unsupported("llama.cpp holds Gemma 2 only with soft caps; use another backend")
        if self.name == "gemma2" and all(layer.window is None for layer in numerics.layers):
            raise Unsupported("llama.cpp aborts at Gemma 2 without a layer that slides; use another backend")
        for index, layer in enumerate(numerics.layers):
            known = ("default",) if layer.window is not None else ("default", "linear")
            if layer.rotary is None or layer.rotary.kind not in known:
                raise Unsupported(
                    f"layer {index}: llama.cpp scales rotary embeddings of Gemma linearly, those of sliding layers not "
                    f"at all; got {layer.rotary and layer.rotary.kind}: use another backend"
                )


GEMMA = {
    "gemma2": Gemma(name="gemma2", family=gemma2.FAMILY),
    "gemma3_text": Gemma(name="gemma3", family=gemma3_text.FAMILY),
}
