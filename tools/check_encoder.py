"""An encoder of texts pruned to a share of its FLOPs, exported, and compared with the dense one on held-out sentences.

    tools/check_encoder --calib python-docs --eval-text corpus.txt
    tools/check_encoder --calib python-docs --eval-text corpus.txt --method taylor --share 80% --model FOLDER

The dense model and the pruned one are written for every runtime and precision that is asked for, and the mean cosine
similarity of their sentence embeddings to those of the dense model in torch is printed, in torch and in each runtime.
FLOPs stand for latency here; nothing is timed.
"""

import argparse
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dilap import export, methods
from dilap.backends.readers import open_network
from dilap.cli.console import run
from dilap.core.network_input import TokenInput
from dilap.core.shape import UNMIXED
from dilap.evaluation.sentence_quality import sentence_quality
from dilap.models.convolutional.cut import shrink_network_
from dilap.models.convolutional.load import NetworkSource, load_network
from dilap.models.network import TorchNetwork
from dilap.models.sentences import SentenceSet, read_sentences
from dilap.search.limit import CostLimit
from dilap.search.network_task import NetworkTask


@dataclass(frozen=True)
class Checked:
    """What is read to calibrate and to score, and the dense model's embeddings of the latter."""

    calibration: NDArray[np.int64]
    evaluation: NDArray[np.int64]
    sentences: SentenceSet
    dense: NDArray[np.float32]

    def line(self, name: str, embeddings: NDArray[np.float32]) -> str:
        found = sentence_quality(embeddings, self.dense, self.sentences)
        return (
            f"{name}: cosine {found.cosine:.4f}, 95 % above {found.low_cosine:.4f}, same nearest sentence "
            f"{found.same_nearest:.1%}"
        )


def prune_(source: NetworkSource, method: str, share: float, calibration: NDArray[np.int64]) -> str:
    """Cut the model in place to a share of its FLOPs, and return what is left of it in words."""
    network = source.traced.network
    limit = CostLimit(limit=share * network.flops(), predict=lambda widths, _=UNMIXED, /: network.flops(widths))
    task = NetworkTask(
        model=source.model, base=source.digest, network=network, images=calibration, cost_limit=limit, multiple=8
    )
    plan = methods.get(method, table=methods.NETWORK_METHODS)(task)
    shrink_network_(source.model, plan)
    pruned = plan.pruned_architecture()
    return (
        f"{pruned.flops() / network.flops():.1%} of {network.flops() / 1e9:.2f} GFLOP, "
        f"{pruned.num_parameters / 1e6:.1f} of {network.num_parameters / 1e6:.1f} M parameters"
    )


def in_runtimes(source: NetworkSource, formats: Sequence[str], checked: Checked, *, name: str) -> None:
    """Print how near the embeddings of a model are to the dense ones in torch and in every runtime and precision."""
    print(checked.line(f"{name}, torch", TorchNetwork(source.model).outputs(checked.evaluation)))
    for one in formats:
        backend, _, precision = one.partition(":")
        with tempfile.TemporaryDirectory() as folder:
            artifact = export.get_network(backend).export(
                source.model,
                input_=source.input,
                precision=precision,
                images=checked.calibration,
                plan_digest="",
                out=Path(folder) / "model",
            )
            network = open_network(backend, Path(folder) / "model" / artifact.path, threads=1)
            found = network.outputs(checked.evaluation)
            network.close()
        print(checked.line(f"{name}, {backend} {precision} (SQNR {artifact.sqnr_db:.1f} dB)", found))


def _main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="all-minilm-l6-v2")
    parser.add_argument("--length", type=int, default=64, help="tokens of a sentence")
    parser.add_argument("--share", default="70%", help="of the FLOPs that stays")
    parser.add_argument("--method", default="uniform")
    parser.add_argument("--calib", required=True, help="a text")
    parser.add_argument("--eval-text", required=True, help="another text")
    parser.add_argument("--sentences", type=int, default=128, help="of each text")
    parser.add_argument("--formats", nargs="*", default=["onnxruntime:f32", "onnxruntime:int8", "executorch:f32"])
    given = parser.parse_args()
    source = load_network(given.model, input_=TokenInput(length=given.length))
    assert isinstance(source.input, TokenInput)
    assert source.folder is not None
    calibration, evaluation = (
        read_sentences(text, tokenizer=source.folder).split(train=given.sentences, validation=0, seed=0)[0]
        for text in (given.calib, given.eval_text)
    )
    tokens = evaluation.all_tokens(source.input)
    dense = TorchNetwork(source.model).outputs(tokens)
    checked = Checked(calibration.all_tokens(source.input), tokens, evaluation, dense)
    print(f"{len(tokens)} sentences of {evaluation.name}, {tokens[:, 1].sum(1).mean():.0f} tokens in the mean")
    in_runtimes(source, given.formats, checked, name="dense")
    print(prune_(source, given.method, float(given.share.rstrip("%")) / 100, checked.calibration))
    in_runtimes(source, given.formats, checked, name=given.method)
    return 0


if __name__ == "__main__":
    run(_main)
