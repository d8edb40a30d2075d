"""Checkpoints of encoders load where DiLAP is not installed, and say how texts become tokens and embeddings."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from standins.encoders import INPUT, encoder, output, shape, texts, write_tokenizer
from standins.networks import network, random_pixels
from standins.networks import output as of_images
from standins.networks import shape as image_shape
from torch.testing import assert_close
from transformers import PreTrainedModel

from dilap.core.errors import InvalidInput, Unsupported
from dilap.core.graph import Network
from dilap.core.images import ImageInput
from dilap.core.network_input import TokenInput
from dilap.core.plan import Plan, full_plan
from dilap.models.convolutional.cut import shrink_network_
from dilap.models.convolutional.load import load_network, save_network
from dilap.models.convolutional.proof import halves

ALONE = """
import sys
sys.modules["dilap"] = None  # importing it raises, wherever it is installed
from pathlib import Path
import torch
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForImageClassification, pipeline
root = Path(sys.argv[1])
given = load_file(root / "reference.safetensors")
ids, mask, types = given["tokens"].unbind(1)
for name, loader, inputs in (
    ("bert", AutoModel, {"input_ids": ids, "attention_mask": mask, "token_type_ids": types}),
    ("vit", AutoModelForImageClassification, {"pixel_values": given["images"]}),
    ("deit", AutoModelForImageClassification, {"pixel_values": given["images"]}),
):
    model = loader.from_pretrained(root / name, trust_remote_code=True).eval()
    with torch.no_grad():
        found = model(**inputs)
    torch.testing.assert_close(found.logits if name != "bert" else found.last_hidden_state, given[name])
    print(type(model).__name__)
extract = pipeline("feature-extraction", model=str(root / "bert"), trust_remote_code=True)
print(len(extract("the cat sat")[0][0]))
"""


def plan(shape: Network, kept: dict[str, tuple[int, ...]]) -> Plan[Network]:
    return Plan(base="", architecture=shape, kept=full_plan(shape, base="").kept | kept)


def narrow() -> PreTrainedModel:
    """Half of all units, without the last feed-forward network."""
    kept = halves(shape()) | {"encoder.layer.1.channels": ()}
    made = shrink_network_(encoder(), plan(shape(), kept))
    assert isinstance(made, PreTrainedModel)
    return made


def pooling(model: Any) -> str:
    found: str = model.config.sentence_pooling
    return found


@pytest.fixture
def dense(tmp_path: Path) -> Path:
    """The folder of a dense encoder, as sentence-transformers keeps them."""
    save_network(encoder(), tmp_path / "dense")
    write_tokenizer(tmp_path / "dense")
    (tmp_path / "dense" / "1_Pooling").mkdir()
    modes = {"word_embedding_dimension": 32, "pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}
    (tmp_path / "dense" / "1_Pooling" / "config.json").write_text(json.dumps(modes))
    return tmp_path / "dense"


def test_narrowed_encoders_load_where_dilap_is_not_installed(tmp_path: Path, dense: Path) -> None:
    model: Any = narrow()
    tokens, images = texts(), torch.from_numpy(random_pixels(2))
    ids, mask, types = tokens.unbind(1)
    with torch.no_grad():
        hidden = model(input_ids=ids, attention_mask=mask, token_type_ids=types).last_hidden_state
    reference = {"tokens": tokens, "images": images, "bert": hidden}
    save_network(model, tmp_path / "bert", source=dense)
    for name in ("vit", "deit"):
        one = shrink_network_(network(name), plan(image_shape(name), halves(image_shape(name), seed=1)))
        reference[name] = of_images(one)
        save_network(one, tmp_path / name)
    save_file(reference, tmp_path / "reference.safetensors")
    home = str(tmp_path / "home")
    done = subprocess.run(
        [sys.executable, "-c", ALONE, str(tmp_path)],
        capture_output=True, text=True, check=False,
        env={name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        | {"HF_HUB_OFFLINE": "1", "HF_HOME": home, "HF_MODULES_CACHE": home},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    kinds = ["NarrowedBertModel", "ViTForImageClassification", "DeiTForImageClassificationWithTeacher"]
    # The config of a ViT can say that it has fewer heads.
    assert done.stdout.split() == [*kinds, "32"]


def test_a_narrowed_encoder_is_read_back_with_its_tokenizer_and_its_pooling(tmp_path: Path, dense: Path) -> None:
    loaded = load_network(str(dense), input_=INPUT)
    made = shrink_network_(loaded.model, plan(loaded.traced.network, halves(shape())))
    save_network(made, tmp_path / "saved", source=dense)
    found = load_network(str(tmp_path / "saved"))
    assert_close(output(found.model), output(made), rtol=0, atol=0)
    assert found.input == TokenInput(length=16)  # as many as it has positions
    assert pooling(found.model) == "first"
    assert (tmp_path / "saved" / "vocab.txt").read_bytes() == (dense / "vocab.txt").read_bytes()


def test_equal_numbers_of_channels_need_no_file(tmp_path: Path) -> None:
    kept = {group.name: tuple(range(0, 48, 2)) for group in shape().groups if group.name.endswith("channels")}
    save_network(shrink_network_(encoder(), plan(shape(), kept)), tmp_path / "stock")
    config = json.loads((tmp_path / "stock" / "config.json").read_text())
    assert (config["architectures"], config["intermediate_size"]) == (["BertModel"], 24)
    assert not list((tmp_path / "stock").glob("*.py"))


def test_a_narrowed_classifier_of_texts_is_read_back(tmp_path: Path) -> None:
    made = shrink_network_(encoder("classifier"), plan(shape("classifier"), halves(shape("classifier"))))
    save_network(made, tmp_path / "saved")
    config = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert list(config["auto_map"]) == ["AutoConfig", "AutoModelForSequenceClassification"][1:]
    assert_close(output(load_network(str(tmp_path / "saved")).model), output(made), rtol=0, atol=0)


def test_a_pooler_makes_no_embedding_and_may_be_missing(dense: Path) -> None:
    tensors = load_file(dense / "model.safetensors")
    kept = {name: value for name, value in tensors.items() if not name.startswith("pooler")}
    save_file(kept, dense / "model.safetensors", metadata={"format": "pt"})
    assert pooling(load_network(str(dense)).model) == "first"


@pytest.mark.parametrize(
    ("modes", "reason"),
    [
        (
            {"pooling_mode_max_tokens": True},
            "has pooling_mode_max_tokens; what is known is pooling_mode_mean",
        ),
        ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": True}, "has pooling_mode_cls_token and pooling"),
        ({}, "has no mode"),
    ],
)
def test_another_pooling_is_refused(modes: dict[str, bool], reason: str, dense: Path) -> None:
    (dense / "1_Pooling" / "config.json").write_text(json.dumps(modes))
    with pytest.raises(Unsupported, match=reason):
        load_network(str(dense))


def test_an_encoder_of_texts_takes_no_images(dense: Path) -> None:
    with pytest.raises(InvalidInput, match="takes texts, and not 3x32x32"):
        load_network(str(dense), input_=ImageInput.parse("3x32x32"))


def test_more_tokens_than_positions_are_refused(dense: Path) -> None:
    with pytest.raises(InvalidInput, match="takes no input of 40 tokens"):
        assert load_network(str(dense), input_=TokenInput(length=40)).traced
