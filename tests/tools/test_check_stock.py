"""tools/check_stock: its arithmetic, what it refuses, and that the stock runtimes open what is exported."""

import ast
import importlib
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from standins.models import tiny_model, tiny_tokenizer

from dilap import backends, export
from dilap.backends.executorch import runtime as executorch
from dilap.core.workload import Workload
from dilap.models.load import save_checkpoint

check_stock: Any = importlib.import_module("tools.check_stock")
FILE = Path(check_stock.__file__)
WORK = check_stock.Work(
    backend="llamacpp", files=("dense", "pruned"), decode=True, num_tokens=16, threads=1, switches={}
)
RUN = check_stock.Run(work=WORK, fraction=0.7, seconds=None, quantile=0.5)


def samples(*ratios: float, noise: float = 0.0, num_rounds: int = 12) -> NDArray[np.float64]:
    """Processes of these ratios around 10 ms: (processes x 2 models x rounds x 5 samples) in nanoseconds."""
    drawn = 1 + noise * np.random.default_rng(0).standard_normal((len(ratios), 2, num_rounds, 5))
    scale = np.array([[1.0, ratio] for ratio in ratios])[:, :, None, None]
    found: NDArray[np.float64] = 1e7 * scale * drawn
    return found


def test_ratio_and_latencies_are_those_of_the_samples() -> None:
    found = check_stock.finding(samples(0.6, 0.6, 0.6), RUN)
    assert (found.dense, found.pruned) == (pytest.approx(0.01), pytest.approx(0.006))
    assert found.ratio == pytest.approx((0.6, 0.6, 0.6))
    assert found.share == pytest.approx((6 / 7, 6 / 7, 6 / 7))


@pytest.mark.parametrize(
    ("ratios", "verdict"),
    [((0.68, 0.69, 0.68), "kept"), ((0.72, 0.71, 0.72), "missed"), ((0.66, 0.74, 0.69, 0.72), "within the noise")],
)
def test_verdict_is_that_of_the_whole_interval_over_processes(ratios: tuple[float, ...], verdict: str) -> None:
    assert check_stock.finding(samples(*ratios, noise=0.002), RUN).verdict == verdict


def test_noise_inside_a_process_widens_the_interval() -> None:
    quiet, loud = (check_stock.finding(samples(0.6, 0.6, noise=noise), RUN).ratio for noise in (0.01, 0.1))
    assert loud[2] - loud[1] > 3 * (quiet[2] - quiet[1])
    assert quiet[1] < 0.6 < quiet[2]


def test_a_budget_in_seconds_is_about_the_pruned_model_alone() -> None:
    run = replace(RUN, fraction=None, seconds=0.008)
    assert check_stock.finding(samples(0.6, 0.6), run).share == pytest.approx((0.75, 0.75, 0.75))


def test_a_budget_for_p90_is_about_slow_samples() -> None:
    found = samples(0.6, 0.6)
    found[:, 1, :, 0] *= 2  # every fifth of the pruned model's
    assert check_stock.finding(found, RUN).verdict == "kept"
    assert check_stock.finding(found, replace(RUN, quantile=0.9)).verdict == "missed"


def run_folder(tmp_path: Path, *, sidecar: dict[str, Any] | None = None, **changes: Any) -> Path:
    result = {
        "type": "PruneResult",
        "status": "kept",
        "target": "host_cpu",
        "backend": "llamacpp",
        "budget": {"fraction": 0.7, "seconds": None, "ratio": None, "statistic": "p50"},
        "workload": {"phase": "decode", "context": 16, "prompt_tokens": 8, "threads": 2, "switches": {"a": "b"}},
    }
    for name in ("dense", "artifact"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "artifact.json").write_text(json.dumps({"path": "model.gguf"} | (sidecar or {})))
    (tmp_path / "result.json").write_text(json.dumps(result | changes))
    return tmp_path


def test_a_run_is_read_with_its_budget_and_work(tmp_path: Path) -> None:
    run = check_stock.read_run(run_folder(tmp_path))
    assert (run.fraction, run.seconds, run.quantile) == (0.7, None, 0.5)
    assert (run.work.decode, run.work.num_tokens, run.work.threads) == (True, 16, 2)
    assert run.work.files == (str(tmp_path / "dense" / "model.gguf"), str(tmp_path / "artifact" / "model.gguf"))
    assert run.work.switches == {"a": "b"}


def test_how_to_run_is_what_the_artifact_says(tmp_path: Path) -> None:
    run = check_stock.read_run(run_folder(tmp_path, sidecar={"run": {"threads": 3, "switches": {"c": "d"}}}))
    assert (run.work.threads, run.work.switches) == (3, {"c": "d"})


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"type": "SparseResult"}, "is no run with a latency budget: result.json is a SparseResult"),
        ({"status": "estimated"}, "was not measured on a machine like this"),
        ({"target": "s23"}, "was not measured on a machine like this: s23"),
        ({"budget": {"ratio": 0.3}}, "there is no latency to keep"),
    ],
)
def test_what_cannot_be_checked_is_refused(changes: dict[str, Any], words: str, tmp_path: Path) -> None:
    with pytest.raises(check_stock.BadInput, match=words):
        check_stock.read_run(run_folder(tmp_path, **changes))


@pytest.mark.parametrize("content", [None, "{", "[]"])
def test_bad_input_is_one_line(content: str | None, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "result.json").write_text(content)
    done = subprocess.run([sys.executable, FILE, tmp_path], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith(f"error: {tmp_path / 'result.json'}")


def test_nothing_of_dilap_is_imported() -> None:
    imports = [node for node in ast.walk(ast.parse(FILE.read_text())) if isinstance(node, ast.Import | ast.ImportFrom)]
    names = {getattr(node, "module", None) or node.names[0].name for node in imports}
    assert not any(name.startswith("dilap") for name in names)
    assert '"dilap' not in FILE.read_text()  # nor by name


@pytest.mark.parametrize("decode", [True, False], ids=["decode", "prefill"])
@pytest.mark.parametrize("plain", [True, False], ids=["plain", "as_said"])
@pytest.mark.parametrize("backend", ["llamacpp", "onnxruntime"])
def test_a_stock_runtime_does_the_work(backend: str, plain: bool, decode: bool, tmp_path: Path) -> None:
    if reason := backends.get(backend).unavailable():
        pytest.skip(reason)
    save_checkpoint(tiny_model("llama"), tiny_tokenizer(tmp_path / "words"), tmp_path / "model")
    out = tmp_path / "out"
    artifact = export.get(backend).export(
        tiny_model("llama"), tokenizer=tmp_path / "model", precision="f32", plan_digest="", out=out
    )
    file = str(out / artifact.path)
    switches = {"flash_attention": "off", "spinning": "off"}
    work = replace(WORK, backend=backend, files=(file, file), decode=decode, switches=switches, plain=plain)
    found = np.array(check_stock.in_fresh_process(work, rounds=2))
    assert found.shape == (2, 2, 5)
    assert (found > 0).all()


def test_a_file_that_the_runtime_refuses_is_one_line(tmp_path: Path) -> None:
    pytest.importorskip("llama_cpp")
    (tmp_path / "a.gguf").write_bytes(b"GGUF")
    file = str(tmp_path / "a.gguf")
    with pytest.raises(check_stock.BadInput, match="llama-cpp-python failed") as caught:
        check_stock.in_fresh_process(replace(WORK, files=(file, file)), rounds=2)
    assert "\n" not in str(caught.value)


def test_how_to_run_a_program_works(tmp_path: Path) -> None:
    """What artifact.json says of ExecuTorch's Python runtime, up to the file that is not there."""
    backend = executorch.ExecuTorch()
    if reason := backend.unavailable():
        pytest.skip(reason)
    code = backend.how_to_run(str(tmp_path / "model.pte"), Workload(threads=2))["python"]
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=False)
    assert "model.pte" in done.stderr.strip().splitlines()[-1]
