"""How networks that are no decoders are loaded without DiLAP: code for the cards of checkpoints and artifacts."""

from collections.abc import Mapping
from pathlib import Path

from transformers import PreTrainedModel

from dilap.core.artifact import Artifact
from dilap.core.images import ImageInput
from dilap.core.network_input import TOKEN_INPUTS, NetworkInput, TokenInput
from dilap.models.builtin import LITE
from dilap.models.convolutional.load import NetworkSource
from dilap.models.convolutional.narrowing import RECORD
from dilap.models.image_processor import CONFIG

_SENTENCE = "The river is wide."
_TOKENIZER, _RUNTIME = "from transformers import AutoTokenizer", "from executorch.runtime import Runtime"
_IN_TORCH = """\
import torch
from transformers import AutoModelForImageClassification

model = AutoModelForImageClassification.from_pretrained("."{code}).eval()
with torch.inference_mode():
    logits = model(torch.zeros({shape})).logits"""
_OF_PHOTOGRAPHS = """\
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForImageClassification

processor = AutoImageProcessor.from_pretrained(".")
model = AutoModelForImageClassification.from_pretrained("."{code}).eval()
with torch.inference_mode():
    logits = model(**processor(Image.open("photo.jpg"), return_tensors="pt")).logits
print(model.config.id2label[int(logits.argmax())])"""
_OF_TEXTS = """\
import torch
from transformers import AutoModel, AutoTokenizer

words = AutoTokenizer.from_pretrained(".")
model = AutoModel.from_pretrained("."{code}).eval()
tokens = words(["{sentence}"], padding=True, truncation=True, max_length={length}, return_tensors="pt")
with torch.inference_mode():
    hidden, mask = model(**tokens).last_hidden_state, tokens["attention_mask"].unsqueeze(-1)
embeddings = torch.nn.functional.normalize({pooled}, dim=1)"""
_POOLED: Mapping[str, str] = {"mean": "(hidden * mask).sum(1) / mask.sum(1)", "first": "hidden[:, 0]"}
_OF_ONES_OWN = """\
{imported}
from modeling_narrowed import load_narrowed_

model = load_narrowed_({built}, ".")"""
_TOKENIZED = """\
words = AutoTokenizer.from_pretrained(".")
fill = {{"padding": "max_length", "truncation": True, "max_length": {length}, "return_token_type_ids": True}}
tokens = words(["{sentence}"] * {batch}, **fill, return_tensors="{tensors}")
"""
_IN_ONNX_RUNTIME = """\
{imported}

{tokens}session = onnxruntime.InferenceSession("{file}")
(outputs,) = session.run(None, {inputs})"""
_IN_EXECUTORCH = """\
{imported}

{tokens}method = Runtime.get().load_program("{file}").load_method("forward")
(outputs,) = method.execute({inputs})"""


def of_checkpoint(folder: Path, source: NetworkSource) -> str:
    """Return code that loads the checkpoint in `folder` in torch, which was written of a network."""
    if (folder / RECORD).is_file():
        return _OF_ONES_OWN.format(**_building(source.name))
    assert isinstance(source.model, PreTrainedModel)
    code = ", trust_remote_code=True" if hasattr(source.model.config, "narrowed") else ""
    if isinstance(source.input, TokenInput):
        pooled = _POOLED[source.model.config.sentence_pooling]
        return _OF_TEXTS.format(code=code, sentence=_SENTENCE, length=source.input.length, pooled=pooled)
    if (folder / CONFIG).is_file():
        return _OF_PHOTOGRAPHS.format(code=code)
    return _IN_TORCH.format(code=code, shape=", ".join(map(str, source.input.shape)))


def _building(name: str) -> dict[str, str]:
    """Return the import and the expression that build the dense network of a user's own, or of a package."""
    module, _, attribute = name.partition(":")
    if not attribute:
        return {"imported": f"from {LITE} import EfficientNet", "built": f'EfficientNet.from_name("{name}")'}
    return {"imported": f"import {module}", "built": f"{module}.{attribute}()"}


def of_artifact(artifact: Artifact) -> str:
    """Return code that runs an artifact in its runtime; empty for one that only its device can build."""
    templates = {"onnxruntime": _in_onnx_runtime, "executorch": _in_executorch}
    make = templates.get(artifact.backend)
    return "" if make is None or artifact.input is None else make(artifact.path, artifact.input)


def _in_onnx_runtime(file: str, input_: NetworkInput) -> str:
    imported, tokens = ["import numpy", "import onnxruntime"], ""
    inputs = f'{{"images": numpy.zeros({input_.shape}, "float32")}}'
    if isinstance(input_, TokenInput):
        imported, tokens = ["import onnxruntime", _TOKENIZER], _tokenized(input_, tensors="np")
        inputs = '{one.name: tokens[one.name].astype("int64") for one in session.get_inputs()}'
    return _IN_ONNX_RUNTIME.format(imported="\n".join(imported), tokens=tokens, file=file, inputs=inputs)


def _in_executorch(file: str, input_: NetworkInput) -> str:
    imported, tokens = ["import executorch.kernels.quantized", "import torch", _RUNTIME], ""
    inputs = f"[torch.zeros{input_.shape}]"
    if isinstance(input_, TokenInput):
        imported, tokens = [imported[0], _RUNTIME, _TOKENIZER], _tokenized(input_, tensors="pt")
        inputs = f"[tokens[name] for name in {TOKEN_INPUTS}]"
    return _IN_EXECUTORCH.format(imported="\n".join(imported), tokens=tokens, file=file, inputs=inputs)


def _tokenized(input_: TokenInput, *, tensors: str) -> str:
    return _TOKENIZED.format(sentence=_SENTENCE, batch=input_.batch, length=input_.length, tensors=tensors)


def input_in_words(input_: NetworkInput) -> str:
    """Say what a network takes, and how photographs become that, where it is known."""
    if isinstance(input_, TokenInput):
        return f"a batch of {input_.batch}, each a text of {input_}; a shorter one is filled with padding"
    return f"a batch of {input_.batch}, each an image of {input_} in f32{_preprocessing_in_words(input_)}"


def _preprocessing_in_words(input_: ImageInput) -> str:
    found = input_.preprocessing
    if found is None:
        return "; how photographs become that is not known"
    side = "x".join(map(str, found.resize)) if len(found.resize) > 1 else f"a shorter side of {found.resize[0]}"
    mean, std = (", ".join(f"{one:.5g}" for one in values) for values in (found.mean, found.std))
    return (
        f"; a photograph is resized to {side} ({found.resample}), its middle is taken, and of values from 0 to 255 "
        f"every channel becomes (value - mean) / std with the means {mean} and the stds {std}"
    )
