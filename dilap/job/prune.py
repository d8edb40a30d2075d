"""The main job: prune a model to a budget, and measure the smaller model."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from dilap import __version__, backends, methods
from dilap.backends import Backend
from dilap.core.codec import encode, write_json
from dilap.core.progress import Progress
from dilap.core.shape import Architecture
from dilap.job.bench import Bench
from dilap.job.formats import dense_files
from dilap.job.inputs import inputs_of
from dilap.job.options import JobOptions
from dilap.job.proof import claim
from dilap.job.recovery import require_recovery
from dilap.job.result import PruneResult
from dilap.job.run_folder import Workspace
from dilap.job.stages import Stages
from dilap.models.anatomy import architecture_of
from dilap.models.context import require_context, require_sequences
from dilap.models.load import Source, load
from dilap.models.text import require_texts
from dilap.profilers.devices.device import Device
from dilap.search.layouts import Layout, default_layout, describe, require_layout
from dilap.search.method import Method


def prune(
    options: JobOptions,
    *,
    devices: Sequence[Device],
    out: Path,
    progress: Progress,
    shared: Path | None = None,
    source: Source | None = None,
    tables: Path | None = None,
) -> PruneResult | None:
    """Run the whole job and write its results into the folder `out`.

    Returns None, and writes nothing, where the dense model already keeps the budget. The first of `devices` is the
    target; the others are of its kind and share the work of the latency table. `shared` is a folder for what several
    jobs have in common. `source` is the model of the options where it is loaded already; the job changes it in place.
    `tables` is the folder of latency tables, `tables/` by default. Raises DilapError.
    """
    workspace = Workspace(out, progress, shared=shared)
    bench = Bench.of(
        devices,
        options.backend,
        options.workload,
        workspace.log,
        force=options.force,
        tables=tables,
        estimate=options.estimate,
    )
    with workspace.stage("load the model"):
        source = source or load(
            options.model,
            merge_adapter=options.merge_adapter,
            vocabulary=options.vocabulary,
            compute=options.compute,
        )
    architecture = architecture_of(source.model)
    layout = _layout(options, bench.backend, architecture)
    method = _method(options, layout)
    require_possible(options, source)
    bench = bench.mixing(options.precisions, architecture)
    identity = {"options": asdict(options), "model": source.digest, "dilap": __version__}
    with workspace.opened({**identity, "inputs": named_inputs(options, source)}):
        workspace.log.say(f"{source.name}: {describe(architecture)}, on {source.model.device}")
        for note in source.notes:
            workspace.log.say(note)
        stages = Stages(options=options, workspace=workspace, bench=bench, source=source)
        result = _run(stages, method, layout)
        if result is None:
            workspace.discard()
        else:
            write_json(workspace.folder / "result.json", encode(result))
            workspace.finish()
    return result


def named_inputs(options: JobOptions, source: Source) -> dict[str, str]:
    """Return the digests of the inputs that the options name; see `inputs_of`."""
    return inputs_of(
        source.tokenizer,
        calibration=options.calibration.source,
        evaluation=options.evaluation_text,
        recovery=options.recovery.data,
        method=options.method,
        table=options.table,
        vocabulary=source.vocabulary,
    )


def require_possible(options: JobOptions, source: Source) -> None:
    """Raise Unsupported or InvalidInput for a model, a context or a text that cannot work, before anything runs."""
    backend, workload, config = backends.get(options.backend), options.workload, source.model.config
    architecture = architecture_of(source.model)
    backends.require_loadable(backend, architecture, precision=workload.precision)
    held = backend.capabilities(architecture, precision=workload.precision).max_tokens
    require_context(config, workload, runtime=options.backend, runtime_tokens=held)
    require_sequences(config, options.calibration.sequence_length)
    require_texts(options.text, options.evaluation_text, source.tokenizer)
    require_recovery(options.recovery, source)


def _run(stages: Stages, method: Method, layout: Layout) -> PruneResult | None:
    dense = stages.dense_artifact()
    stages = stages.configured(dense)
    goal = stages.goal(dense, layout)
    if goal is None:
        return None
    files = dense_files(stages)
    text = stages.calibration()
    return claim(stages, goal, stages.prune(method, goal, text), text, files)


def _method(options: JobOptions, layout: Layout) -> Method:
    """Return the method asked for; DiLAP's own has another search for equal widths. Raises InvalidInput."""
    own = layout == "uniform" and options.method in ("dilap", "prune_then_quantise")
    name = "equal_widths" if own else options.method
    method: Method = methods.get(name, options.settings)
    return method


def _layout(options: JobOptions, backend: Backend, architecture: Architecture) -> Layout:
    capabilities = backend.capabilities(architecture, precision=options.workload.precision)
    layout = options.layout or default_layout(capabilities)
    require_layout(layout, capabilities)
    return layout
