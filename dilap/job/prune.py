"""The main job for decoders: prune one to a budget, and measure the smaller model."""

from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path

from dilap import __version__, backends, methods
from dilap.backends import Backend
from dilap.core.codec import encode
from dilap.core.errors import InvalidInput
from dilap.core.plan import full_plan
from dilap.core.progress import Progress
from dilap.core.shape import Architecture
from dilap.job import ending
from dilap.job.bench import Bench
from dilap.job.card import write_cards
from dilap.job.forecast import Machine, needs_on
from dilap.job.formats import dense_files
from dilap.job.inputs import inputs_of
from dilap.job.options import JobOptions
from dilap.job.proof import claim
from dilap.job.recovery import require_recovery
from dilap.job.result import PruneResult
from dilap.job.run_folder import Workspace
from dilap.job.shortages import shortages
from dilap.job.stages import Stages
from dilap.models.anatomy import architecture_of
from dilap.models.context import require_context, require_sequences
from dilap.models.load import Source, load
from dilap.models.origin import origin_of
from dilap.models.processes import team
from dilap.models.text import require_texts, training_text
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
    methods.get(options.method, options.settings)  # what is wrong with a setting is found before a model is read
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
        source = source or load_source(options)
    architecture = architecture_of(source.model)
    layout = _layout(options, bench.backend, architecture)
    method = _method(options, layout)
    require_possible(options, source)
    bench = bench.mixing(options.precisions, architecture)
    identity = {"options": asdict(options), "model": source.digest, "dilap": __version__}
    with workspace.opened({**identity, "inputs": named_inputs(options, source)}):
        workspace.log.say(f"{source.name}: {describe(architecture)}, on {source.model.device}")
        for note in (*source.notes, *_shortages(options, source)):
            workspace.log.say(note)
        stages = Stages(options=options, workspace=workspace, bench=bench, source=source)
        result = _run(stages, method, layout)
        if result is not None:
            workspace.log.keep(ending.text(result))
            write_cards(workspace.folder, result, origin_of(source.model.config))
        workspace.end(None if result is None else encode(result))
    return result


def _shortages(options: JobOptions, source: Source) -> list[str]:
    model = source.model
    needs_in = partial(needs_on, model.device, architecture_of(model), weight_bytes=model.dtype.itemsize)
    return shortages(options, needs_in, Machine.here(model.device))


def load_source(options: JobOptions) -> Source:
    """Load the decoder of a job."""
    return load(
        options.model,
        merge_adapter=options.merge_adapter,
        vocabulary=options.vocabulary,
        compute=options.compute,
    )


def named_inputs(options: JobOptions, source: Source) -> dict[str, str]:
    """Return the digests of the inputs that the options name; see `inputs_of`."""
    return inputs_of(
        source.tokenizer,
        calibration=options.calibration,
        evaluation=options.evaluation_text,
        recovery=options.recovery.data,
        method=options.method,
        training=options.training_text,
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
    _require_shares(options)
    if options.training_text is not None:
        training_text(options.training_text, source.tokenizer, length=options.calibration.sequence_length)
    require_recovery(options.recovery, source)


def _require_shares(options: JobOptions) -> None:
    """Raise InvalidInput where some of the job's processes would get no sequence of the calibration text."""
    count = team().processes.count
    fewest = min(options.calibration.train_sequences, options.calibration.validation_sequences)
    if count > fewest:
        raise InvalidInput(
            f"{count} processes share the calibration text, and one of its splits has {fewest} sequences: start at "
            f"most {fewest} processes"
        )


def _run(stages: Stages, method: Method, layout: Layout) -> PruneResult | None:
    dense = stages.dense_artifact()
    stages = stages.configured(dense)
    goal = stages.goal(dense, layout)
    if goal is None:
        return None
    source = stages.source
    own = stages.options.workload.precision if source.vocabulary is None else ""  # the dense file has all tokens
    files = dense_files(stages, full_plan(architecture_of(source.model), base=source.digest), own=own)
    text = stages.calibration()
    return claim(stages, goal, stages.prune(method, goal, text), text, files)


def _method(options: JobOptions, layout: Layout) -> Method:
    """Return the method asked for; DiLAP's own has another search for equal widths. Raises InvalidInput."""
    own = layout == "uniform" and options.method in ("dilap", "prune_then_quantise")
    name = "equal_widths" if own else options.method
    method: Method = methods.get(name, methods.trained_for(name, options.settings, steps=options.train_steps))
    return method


def _layout(options: JobOptions, backend: Backend, architecture: Architecture) -> Layout:
    capabilities = backend.capabilities(architecture, precision=options.workload.precision)
    layout = options.layout or default_layout(capabilities)
    require_layout(layout, capabilities)
    return layout
