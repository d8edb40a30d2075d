"""The main job: model and budget in, a measured smaller model out."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from dilap import __version__, registry
from dilap.anatomy import architecture_of
from dilap.backends import Backend
from dilap.cli.bench import Bench
from dilap.cli.claim import claim
from dilap.cli.console import Console
from dilap.cli.estimated_bench import EstimatedBench
from dilap.cli.result import PruneResult
from dilap.cli.stages import JobOptions, Stages
from dilap.cli.workspace import Workspace
from dilap.codec import encode, write_json
from dilap.errors import DilapError, Unsupported
from dilap.methods import METHODS
from dilap.methods.task import Method
from dilap.profilers.devices import Device
from dilap.profilers.search_space import Layout, default_layout, describe, require_layout
from dilap.source import load
from dilap.types import full_plan


def prune(
    options: JobOptions, *, device: Device, helpers: Sequence[Device] = (), out: Path, console: Console
) -> PruneResult | None:
    """Run the whole job into `out`; None where the dense model already keeps the budget (nothing is written)."""
    workspace = Workspace(out, console)
    kind = EstimatedBench if options.estimate else Bench
    bench = kind.of(device, options.backend, options.workload, console, helpers=helpers, force=options.force)
    with workspace.stage("load the model"):
        source = load(options.model)
    architecture = architecture_of(source.model)
    layout = _layout(options, bench.backend, architecture.family)
    method = _method(options.method, layout)
    workspace.open({"options": asdict(options), "model": source.digest, "dilap": __version__})
    console.say(f"{source.name}: {describe(architecture)}")
    stages = Stages(options=options, workspace=workspace, console=console, bench=bench, source=source)
    try:
        result = _run(stages, method, layout)
    except DilapError:
        if not workspace.is_continued:  # its options were bad: nothing to go on with
            workspace.discard()
        raise
    if result is None:
        workspace.discard()
        return None
    write_json(workspace.folder / "result.json", encode(result))
    workspace.finish()
    return result


def _run(stages: Stages, method: Method, layout: Layout) -> PruneResult | None:
    dense_plan = full_plan(architecture_of(stages.source.model), base=stages.source.digest)
    dense = stages.artifact("dense", dense_plan)
    goal = stages.goal(dense, layout)
    if goal is None:
        return None
    text = stages.calibration()
    library = stages.library(goal.space, text.train[: stages.options.calibration.train_sequences])
    found = stages.search(method, goal, library, text, dense)
    return claim(stages, goal, library, found, text)


def _method(name: str, layout: Layout) -> Method:
    """The method of that name; equal widths have a search of their own. Raises InvalidInput, Unsupported."""
    method: Method = registry.get(METHODS, name, kind="method")
    if layout != "uniform" or name == "equal_widths":
        return method
    if name != "dilap":
        raise Unsupported(f"method {name} gives every layer its own widths; --layout uniform needs equal_widths")
    equal_widths: Method = registry.get(METHODS, "equal_widths", kind="method")
    return equal_widths


def _layout(options: JobOptions, backend: Backend, family: str) -> Layout:
    capabilities = backend.capabilities(family, precision=options.workload.precision)
    layout = options.layout or default_layout(capabilities)
    require_layout(layout, capabilities)
    return layout
