"""LLM-Barber: the golden checks of its specification, and the job that prunes to a pattern."""

import json
import math
from pathlib import Path

import pytest
import torch
from standins.fake_job import call, last_line
from standins.models import random_tokens, tiny_model, tiny_tokenizer
from torch import nn
from torch.testing import assert_close

from dilap.cli import prune
from dilap.core.codec import read_json
from dilap.core.errors import InvalidInput
from dilap.models.families import family_of
from dilap.models.families.family import Family
from dilap.models.load import save_checkpoint
from dilap.sparsity.barber import Barber, Block, Granularity, Metric, decoder_matrices, rebuilt_masks, swapped
from dilap.sparsity.pattern import Pattern
from dilap.sparsity.rules import Magnitude, SparseGpt, Wanda, sparsify_

TOKENS = random_tokens(5, 24)
GRANULARITIES: tuple[Granularity, ...] = ("block", "layer", "output1", "input1")


def drawn(seed: int, *, rows: int = 6, columns: int = 16) -> tuple[torch.Tensor, torch.Tensor]:
    """A mask with half of every row kept, and scores."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.rand(rows, columns, generator=generator).argsort(-1)
    return order < columns // 2, torch.rand(rows, columns, generator=generator)


def beneficial(kept: torch.Tensor, scores: torch.Tensor) -> int:
    """K of one group: pairs of the best pruned and the worst kept, while the pruned one is better."""
    down = scores[~kept].sort(descending=True).values
    up = scores[kept].sort().values
    return sum(bool(p > q) for p, q in zip(down, up, strict=False))


@pytest.mark.parametrize("threshold", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("seed", range(20))
def test_and_b3_zeros_stay_and_flips_are_twice_the_swaps(seed: int, threshold: float) -> None:
    kept, scores = drawn(seed)
    found = swapped(kept, scores, threshold=threshold)
    assert torch.equal(found.sum(1), kept.sum(1))
    for row in range(6):
        swaps = int(beneficial(kept[row], scores[row]) * threshold)
        assert int((found[row] != kept[row]).sum()) == 2 * swaps


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_zeros_of_every_group_stay(granularity: Granularity) -> None:
    kept = {name: drawn(seed)[0] for seed, name in enumerate("ab")}
    scores = {name: drawn(seed)[1] for seed, name in enumerate("ab")}
    found = rebuilt_masks(kept, scores, granularity=granularity, threshold=0.5)

    def zeros(masks: dict[str, torch.Tensor]) -> list[int]:
        match granularity:
            case "block":
                return [sum(int((~one).sum()) for one in masks.values())]
            case "layer":
                return [int((~one).sum()) for one in masks.values()]
            case "output1":
                return [n for one in masks.values() for n in (~one).sum(1).tolist()]
            case "input1":
                return [n for one in masks.values() for n in (~one).sum(0).tolist()]

    assert zeros(found) == zeros(kept)
    assert any(not torch.equal(found[name], kept[name]) for name in kept)


@pytest.mark.parametrize("seed", range(10))
def test_every_grown_weight_is_better_than_every_newly_pruned_one(seed: int) -> None:
    kept, scores = drawn(seed)
    found = swapped(kept, scores, threshold=0.6)
    for row in range(6):
        grown, gone = scores[row][found[row] & ~kept[row]], scores[row][kept[row] & ~found[row]]
        assert len(grown) == 0 or grown.min() > gone.max()


@pytest.mark.parametrize("seed", range(10))
def test_groups_of_n_in_m_stay(seed: int) -> None:
    scores = drawn(seed)[1]
    kept = Pattern.parse("2:4").keep(drawn(seed + 100)[1])
    found = swapped(kept, scores, threshold=1.0, group=4)
    assert (found.reshape(6, 4, 4).sum(-1) == 2).all()
    assert (scores * found).sum() > (scores * kept).sum()


def test_matrices_taken_before_pruning_stay_dense_without_a_copy() -> None:
    model = tiny_model("llama")
    wanted = {name: value.clone() for name, value in model.named_parameters()}
    dense = decoder_matrices(model)
    first = model.get_parameter("model.layers.0.mlp.up_proj.weight")
    assert dense["0.mlp.up_proj"].data_ptr() == first.data_ptr()
    sparsify_(model, TOKENS, Magnitude(), Pattern.parse("0.5"))
    Barber().rebuild_(model, dense, TOKENS, Pattern.parse("0.5"))
    assert all(torch.equal(weight, wanted[f"model.layers.{name}.weight"]) for name, weight in dense.items())
    assert not torch.equal(first, dense["0.mlp.up_proj"])


def test_no_swaps_leave_the_mask_and_reset_the_weights() -> None:
    model = tiny_model("llama")
    dense = decoder_matrices(model)
    sparsify_(model, TOKENS, SparseGpt(), Pattern.parse("0.5"))
    before = decoder_matrices(model)
    Barber(threshold=0.0).rebuild_(model, dense, TOKENS, Pattern.parse("0.5"))
    for name, weight in decoder_matrices(model).items():
        assert torch.equal(weight == 0, before[name] == 0)
        assert torch.equal(weight, dense[name] * (before[name] != 0))


def test_retained_weights_are_those_of_the_first_pass() -> None:
    model = tiny_model("llama")
    dense = decoder_matrices(model)
    sparsify_(model, TOKENS, SparseGpt(), Pattern.parse("0.5"))
    before = decoder_matrices(model)
    Barber(threshold=0.0, retain=True).rebuild_(model, dense, TOKENS, Pattern.parse("0.5"))
    assert all(torch.equal(weight, before[name]) for name, weight in decoder_matrices(model).items())


class Plain(nn.Module):
    """A layer whose feed-forward network is one matrix."""

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        self.mlp = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
        self.mlp.weight = nn.Parameter(weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.mlp(x)
        return found


def test_gradient_of_a_linear_block_is_the_formula() -> None:
    """R = X (W_dense - W_sparse)^T, gradient = 2 / (T O) R^T X."""
    generator = torch.Generator().manual_seed(0)
    dense, x = torch.randn(3, 5, generator=generator), torch.randn(7, 5, generator=generator)
    sparse = dense * (torch.rand(3, 5, generator=generator) > 0.5)
    family = Family(name="plain", ffn="mlp", ffn_in=(), ffn_out="mlp")
    block = Block(sparse=Plain(sparse), dense=Plain(dense.clone()), family=family, kind="ffn")
    found = block.gradients({}, x)["mlp"]
    assert_close(found, 2 / (7 * 3) * (x @ (dense - sparse).T).T @ x)


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_a_dense_model_changes_nothing(family: str) -> None:
    model = tiny_model(family)
    dense = decoder_matrices(model)
    Barber(threshold=1.0).rebuild_(model, dense, TOKENS, Pattern.parse("0.5"))
    assert all(torch.equal(weight, dense[name]) for name, weight in decoder_matrices(model).items())


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_swaps_reach_the_first_and_the_last_block(family: str) -> None:
    model = tiny_model(family)
    dense = decoder_matrices(model)
    sparsify_(model, TOKENS, Magnitude(), Pattern.parse("0.5"))
    names = family_of(model.config)
    before = decoder_matrices(model)
    Barber(granularity="block", threshold=0.1).rebuild_(model, dense, TOKENS, Pattern.parse("0.5"))
    changed = [name for name, weight in decoder_matrices(model).items() if not torch.equal(weight, before[name])]
    assert f"0.{names.attention_out}" in changed
    assert f"2.{names.ffn_out}" in changed


@pytest.mark.parametrize("metric", ["WD", "W", "D"])
def test_swaps_are_made_by_the_metric_asked_for(metric: Metric) -> None:
    """Every regrown weight scores higher than every newly pruned one of its row, by size, gradient or their product."""
    weight, gradient = torch.tensor([[3.0, -2.0]]), torch.tensor([[1.0, 16.0]])
    scores = Barber(metric=metric)._scores(weight, gradient)
    assert scores.tolist() == {"WD": [[3.0, 8.0]], "W": [[3.0, 2.0]], "D": [[1.0, 4.0]]}[metric]


def test_sizes_of_retained_weights_are_those_that_the_first_pass_gave_them() -> None:
    model = tiny_model("llama")
    dense = decoder_matrices(model)
    sparsify_(model, TOKENS, SparseGpt(), Pattern.parse("0.5"))
    before = decoder_matrices(model)
    Barber(threshold=1.0, metric="W", retain=True).rebuild_(model, dense, TOKENS, Pattern.parse("0.5"))
    for name, weight in decoder_matrices(model).items():
        sizes = torch.where(before[name] != 0, before[name], dense[name]).abs()
        kept = swapped(before[name] != 0, sizes, threshold=1.0)
        assert torch.equal(weight != 0, kept), name


@pytest.mark.parametrize("granularity", ["block", "layer", "input1"])
def test_n_of_m_is_rebuilt_inside_rows_only(granularity: Granularity) -> None:
    model = tiny_model("llama")
    with pytest.raises(InvalidInput, match=f"output1, not {granularity}"):
        Barber(granularity=granularity).rebuild_(model, {}, TOKENS, Pattern.parse("2:4"))


# the job


def sparse(checkpoint: Path, corpus: Path, out: Path, *extra: str) -> int:
    arguments = ["--model", checkpoint, "--calib", corpus, "--eval-text", corpus, "--calib-length", "32"]
    return call(prune.main, *arguments, "--out", out, *extra)


@pytest.mark.parametrize("rebuild", [[], ["--rebuild", "barber"]], ids=["once", "rebuilt"])
@pytest.mark.parametrize("what", ["0.5 magnitude", "0.5 sparsegpt", "2:4 wanda"])
def test_a_run_leaves_a_sparse_checkpoint_and_claims_no_latency(
    what: str, rebuild: list[str], checkpoint: Path, corpus: Path, tmp_path: Path
) -> None:
    pattern, method = what.split()
    assert sparse(checkpoint, corpus, tmp_path / "out", "--pattern", pattern, "--method", method, *rebuild) == 0
    result = read_json(tmp_path / "out" / "result.json")
    assert result["linear_sparsity"] == pytest.approx(0.5, abs=0.01)
    assert result["model_sparsity"] < 0.5
    assert result["claim"].startswith("no latency is claimed")
    assert (tmp_path / "out" / "checkpoint" / "config.json").exists()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_scores_of_tasks_stay_where_the_model_is_deleted(checkpoint: Path, corpus: Path, tmp_path: Path) -> None:
    pytest.importorskip("lm_eval", reason="lm-eval is not installed")
    page = tmp_path / "data" / "wikitext" / "test.jsonl"
    page.parent.mkdir(parents=True)
    page.write_text(json.dumps({"page": "the fox is seen by the dog " * 30}))
    extra = ["--tasks", "wikitext", "--data-dir", str(page.parent.parent), "--delete-model", "--dtype", "bf16"]
    assert sparse(checkpoint, corpus, tmp_path / "out", "--pattern", "0.5", *extra) == 0
    result = read_json(tmp_path / "out" / "result.json")
    evaluation = read_json(tmp_path / "out" / "evaluation-torch.json")
    assert result["tasks"]["wikitext"]["word_perplexity"] == evaluation["tasks"]["wikitext"]["word_perplexity"] > 1
    assert (evaluation["precision"], evaluation["model"]) == ("bf16", str(tmp_path / "out"))
    assert not (tmp_path / "out" / "checkpoint").exists()


def test_a_run_calibrates_on_the_windows_of_a_corpus_in_files(checkpoint: Path, corpus: Path, tmp_path: Path) -> None:
    path = tmp_path / "data" / "c4" / "train.jsonl"
    path.parent.mkdir(parents=True)
    path.write_text("".join(json.dumps({"text": f"the fox {n} is seen by the dog " * 40}) + "\n" for n in range(9)))
    extra = ["--calib", "c4", "--data-dir", str(tmp_path / "data"), "--calib-sequences", "5"]
    assert sparse(checkpoint, corpus, tmp_path / "out", "--pattern", "0.5", *extra) == 0
    result = read_json(tmp_path / "out" / "result.json")
    assert (result["calibration"], result["options"]["calibration"]["train_sequences"]) == ("c4", 5)


def every_second(weight: torch.Tensor, statistics: object, pattern: object) -> torch.Tensor:
    """A rule of a user's own, named as `MODULE:every_second`."""
    kept = torch.arange(weight.shape[1]) % 2 == 0
    return weight * kept


@pytest.mark.parametrize("pattern", ["0.5", "2:4"])
def test_a_rule_of_ones_own_is_rebuilt(pattern: str, checkpoint: Path, corpus: Path, tmp_path: Path) -> None:
    own = ["--method", f"{__name__}:every_second", "--rebuild", "barber", "--threshold", "0.5"]
    assert sparse(checkpoint, corpus, tmp_path / "out", "--pattern", pattern, *own) == 0
    assert read_json(tmp_path / "out" / "result.json")["linear_sparsity"] == pytest.approx(0.5, abs=0.01)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_a_run_on_a_checkpoint_in_half_precision_is_rebuilt(
    dtype: torch.dtype, checkpoint: Path, corpus: Path, tmp_path: Path
) -> None:
    half = tmp_path / "half"
    model = tiny_model("llama").to(dtype)
    save_checkpoint(model, tiny_tokenizer(tmp_path / "words"), half)
    assert sparse(half, corpus, tmp_path / "out", "--pattern", "2:4", "--rebuild", "barber") == 0
    assert math.isfinite(read_json(tmp_path / "out" / "result.json")["sparse"]["kl"])


@pytest.mark.parametrize(
    "case",
    [
        (["--pattern", "5:4"], "pattern '5:4' is not understood"),
        (["--pattern", "2:4", "--method", "flap"], "unknown method 'flap'"),
        (["--pattern", "7:64"], "which groups of 64 do not divide"),
        (
            ["--pattern", "0.5", "--rebuild", "barber", "--threshold", "2"],
            "argument --threshold: a share between 0 and 1",
        ),
        (["--budget", "70%"], "name the device with --target"),
    ],
)
def test_bad_input_is_one_line(
    case: tuple[list[str], str], checkpoint: Path, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    extra, message = case
    assert sparse(checkpoint, corpus, tmp_path / "out", *extra) == 2
    assert message in last_line(capsys)
    assert not list(tmp_path.glob("*out*"))


def test_wanda_is_the_method_for_patterns_by_default(checkpoint: Path, corpus: Path, tmp_path: Path) -> None:
    sparse(checkpoint, corpus, tmp_path / "out", "--pattern", "0.5")
    assert read_json(tmp_path / "out" / "result.json")["method"] == "wanda"
    assert not Wanda().use_variant
