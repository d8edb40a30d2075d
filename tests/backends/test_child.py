"""Native code in a process of its own: what it gives, and what is left of one that dies."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from standins import STANDINS
from standins.dying import Fragile, crash, leave
from standins.fabricated import TINY_LAYER, tiny_llama

from dilap import backends, export
from dilap.backends.child import called, close_children, opened, python_environment
from dilap.backends.llamacpp.build import cmake_args
from dilap.core.errors import Crashed, DilapError, InvalidInput
from dilap.profilers.devices import doctor
from dilap.profilers.devices.device import Registry
from dilap.profilers.instruments.agent import AgentClient, LocalConnection


@pytest.fixture(autouse=True)
def fresh_children(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Children that know the stand-in library."""
    close_children()
    monkeypatch.setenv("PYTHONPATH", str(STANDINS.parent))
    yield
    close_children()


def fragile(name: str = "model.gguf", **options: int) -> Fragile:
    return opened(Fragile, Path(name), runtime="llamacpp", **options)


def test_an_object_lives_in_another_process() -> None:
    assert fragile().process != os.getpid()


def test_arrays_arrive_whole() -> None:
    table = fragile(scale=3).table(300, 5000)  # 6 MB: more than any pipe holds
    np.testing.assert_array_equal(table, np.arange(1_500_000, dtype=np.float32).reshape(300, 5000) * 3)


def test_what_a_library_prints_does_not_disturb_its_answers() -> None:
    assert fragile().total([1, 2, 3]) == 6


def test_properties_are_those_of_when_it_was_opened() -> None:
    assert fragile("some.gguf").path_name == "some.gguf"


def test_a_path_means_the_same_after_the_current_folder_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fragile()  # the child starts here
    monkeypatch.chdir(tmp_path)
    assert fragile("some.gguf").path == str(tmp_path / "some.gguf")


def test_an_attribute_that_is_not_there_is_missing_here_too() -> None:
    assert not hasattr(fragile(), "nothing")


def test_an_error_of_ours_comes_back_as_it_was() -> None:
    with pytest.raises(InvalidInput, match="bad: not a file of ours"):
        fragile("bad")


def test_an_error_of_a_library_is_one_line() -> None:
    with pytest.raises(DilapError, match="RuntimeError: first line second line"):
        fragile().fail()


def test_a_death_says_runtime_signal_work_and_last_words_in_one_line() -> None:
    with pytest.raises(
        Crashed, match=r"^llamacpp died of SIGSEGV while running q4.gguf \(GGML_ASSERT\(tile\) failed\); "
    ):
        fragile("q4.gguf").die(signal.SIGSEGV)


def test_a_death_of_llama_cpp_says_how_to_build_it_without_amx(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dilap.backends.llamacpp.runtime.cmake_args_here", lambda: "-DGGML_NATIVE=OFF")
    with pytest.raises(Crashed, match=r"build it again with CMAKE_ARGS='-DGGML_NATIVE=OFF' pip install"):
        fragile().die(signal.SIGSEGV)


def test_a_death_while_opening_says_so() -> None:
    with pytest.raises(Crashed, match="died of SIGSEGV while opening fatal"):
        fragile("fatal")


def test_an_end_without_a_signal_says_its_status() -> None:
    with pytest.raises(Crashed, match="onnxruntime ended with status 3 while working on"):
        called(leave, 3, runtime="onnxruntime")


def test_another_child_takes_over_after_a_death() -> None:
    with pytest.raises(Crashed):
        fragile().die(signal.SIGABRT)
    assert fragile().total([4]) == 4


def test_an_object_of_a_dead_child_can_be_closed() -> None:
    broken = fragile()
    with pytest.raises(Crashed):
        broken.die(signal.SIGKILL)
    broken.close()  # type: ignore[attr-defined]  # every stand-in has it


def test_runtimes_do_not_share_a_child() -> None:
    other = opened(Fragile, Path("model.onnx"), runtime="onnxruntime")
    with pytest.raises(Crashed):
        fragile().die(signal.SIGSEGV)
    assert other.total([1]) == 1


def test_a_child_ends_with_its_parent_whatever_that_dies_of() -> None:
    program = (
        "import os, pathlib, signal; from standins import dying; from dilap.backends.child import opened\n"
        "made = opened(dying.Fragile, pathlib.Path('m'), runtime='llamacpp')\n"
        "print(made.process, flush=True); os.kill(os.getpid(), signal.SIGKILL)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], env=python_environment(), capture_output=True, text=True, check=False
    )
    child = int(done.stdout)
    for _ in range(100):
        if not Path(f"/proc/{child}").exists():
            return
        time.sleep(0.1)
    pytest.fail("the child outlived its parent by ten seconds")


def test_nothing_in_the_current_folder_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("numpy", "json", "dilap"):
        (tmp_path / f"{name}.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nraise SystemExit(9)\n")
    monkeypatch.chdir(tmp_path)
    assert fragile().total([1, 2]) == 3
    assert not (tmp_path / "ran").exists()


def test_telemetry_is_off_in_every_process_that_we_start() -> None:
    assert python_environment()["ORT_DISABLE_TELEMETRY"] == "1"


def test_an_export_whose_runtime_dies_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dilap.backends.llamacpp.file.validate", crash)
    with pytest.raises(Crashed, match=r"died of SIGSEGV while working on f16\.gguf"):
        export.get("llamacpp").export_probe(tiny_llama(TINY_LAYER), precision="q8_0", seed=0, out=tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_the_doctor_names_the_signal_that_a_runtime_died_of(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dilap.backends.llamacpp.file.validate", crash)
    monkeypatch.setattr(backends, "BACKENDS", {"llamacpp": backends.BACKENDS["llamacpp"]})
    found = next(iter(doctor.examine(Registry())))
    assert not found.usable
    assert "died of SIGSEGV" in found.reason


def test_an_agent_that_dies_says_of_which_signal() -> None:
    client = AgentClient(LocalConnection(), backend="llamacpp", device="host_cpu")
    with closing(client):
        os.kill(client._process._child.pid, signal.SIGSEGV)  # type: ignore[attr-defined]
        with pytest.raises(Crashed, match=r"llamacpp died of SIGSEGV while its agent answered 'state'; "):
            client.state()


AMX = {"sse4_2", "avx", "avx2", "fma", "f16c", "bmi2", "amx_tile", "amx_int8", "amx_bf16", "avx_vnni"}


def test_llama_cpp_is_built_with_what_the_processor_has_and_without_amx() -> None:
    options = cmake_args("x86_64", AMX).split()
    assert options[0] == "-DGGML_NATIVE=OFF"
    assert "-DGGML_AVX2=ON" in options
    assert "-DGGML_AVX512=OFF" in options
    assert not [one for one in options if "AMX" in one and one.endswith("ON")]


def test_llama_cpp_is_scheduled_for_this_processor_as_a_native_build_is() -> None:
    options = cmake_args("x86_64", AMX).split()
    assert {"-DCMAKE_C_FLAGS=-mtune=native", "-DCMAKE_CXX_FLAGS=-mtune=native"} <= set(options)


def test_elsewhere_llama_cpp_chooses_by_itself() -> None:
    assert cmake_args("aarch64", {"asimd"}) == ""


@pytest.mark.parametrize("name", list(backends.BACKENDS))
def test_every_runtime_says_what_to_try_after_a_crash(name: str) -> None:
    assert backends.get(name).after_a_crash()
