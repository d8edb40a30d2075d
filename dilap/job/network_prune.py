"""The main job for networks that are no decoders: prune one to a budget, and measure the smaller network."""

import copy
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from dilap import __version__, backends, methods
from dilap.core.codec import digest, encode, remove, write_json
from dilap.core.errors import Unsupported
from dilap.core.graph import Network
from dilap.core.images import ImageInput
from dilap.core.network_input import NetworkInput, TokenInput
from dilap.core.plan import Plan
from dilap.core.progress import Progress
from dilap.job import ending
from dilap.job.card import write_network_cards
from dilap.job.claims import Calibrated, Claim, claimed, result_of
from dilap.job.common_stages import Goal
from dilap.job.examples import Shown
from dilap.job.formats import Files, dense_files, dense_formats, latency_shares
from dilap.job.inputs import code_sha256
from dilap.job.network_bench import NetworkBench
from dilap.job.network_exam import NetworkExam
from dilap.job.network_options import NetworkOptions
from dilap.job.network_precisions import PrecisionChoice, cut_, prunes, why_not_chosen, without_unheld
from dilap.job.network_recovery import Recovered, recover_network_
from dilap.job.network_stages import NetworkStages
from dilap.job.photographs import GUESSED, shown_photographs, usual_input
from dilap.job.quality import AnyQuality, in_words
from dilap.job.result import PruneResult
from dilap.job.run_folder import Workspace
from dilap.job.sentences import shown_sentences
from dilap.methods import NETWORK_METHODS
from dilap.models.convolutional.load import NetworkSource, load_network, save_network
from dilap.models.convolutional.network import Traced
from dilap.models.network import gives_embeddings
from dilap.profilers.devices.device import Device
from dilap.profilers.tables.networks.table import NetworkTable
from dilap.search.method import Pruned
from dilap.search.network_task import NetworkMethod


def prune_network(
    options: NetworkOptions,
    *,
    devices: Sequence[Device],
    out: Path,
    progress: Progress,
    shared: Path | None = None,
    source: NetworkSource | None = None,
    tables: Path | None = None,
) -> PruneResult[Any] | None:
    """Run the whole job and write its results into the folder `out`.

    The arguments are those of `dilap.job.prune.prune`, which returns the same. Raises DilapError.
    """
    method: NetworkMethod = methods.get(options.method, options.settings, table=NETWORK_METHODS)
    workspace = Workspace(out, progress, shared=shared)
    bench = NetworkBench.of(
        devices,
        options.backend,
        options.workload,
        workspace.log,
        force=options.force,
        tables=tables,
        estimate=options.estimate,
    ).mixing(options.precisions)
    with workspace.stage("load the model"):
        source = source or load_source(options)
        traced = source.traced
    with workspace.stage("find the examples"):
        shown = _shown(options, source)
    identity = {"options": asdict(options), "model": source.digest, "dilap": __version__}
    with workspace.opened({**identity, "inputs": _inputs_of(options, shown)}):
        for line in (f"{source.name}: {describe(traced, source.input)}", *source.notes, shown.describe()):
            workspace.log.say(line)
        stages = NetworkStages(
            options=options, workspace=workspace, bench=bench, source=source, network=traced.network, shown=shown
        )
        result = _run(stages, method)
        if result is not None:
            workspace.log.keep(ending.text(result))
            write_network_cards(workspace.folder, result, source)
        workspace.end(None if result is None else encode(result))
    return result


def load_source(options: NetworkOptions) -> NetworkSource:
    """Load the network of a job; see `load_timed`.

    Where nobody says how photographs become its inputs, they are taken as most networks take them, with a note.
    """
    found = load_timed(options)
    if not isinstance(found.input, ImageInput):
        return found
    notes = found.notes if found.input.preprocessing is not None else (GUESSED,)
    return replace(found, input=usual_input(found.input), notes=notes)


def load_timed(options: NetworkOptions) -> NetworkSource:
    """Load a network that is timed, with as many examples at once as the job's workload has.

    Raises Unsupported for a network that takes texts where the runtime holds none, or that gives no embeddings of them.
    """
    found = load_network(
        options.model,
        input_=options.input,
        processor=None if options.processor is None else Path(options.processor),
        weights=options.weights,
    )
    if isinstance(found.input, TokenInput) and not gives_embeddings(found.model):
        raise Unsupported(
            f"{options.model} classifies texts, and encoders of texts are pruned by their embeddings: give the encoder "
            "alone, which transformers' AutoModel saves"
        )
    backend, precision = backends.get(options.backend), options.workload.precision
    backends.require_network_input(backend, found.input, precision=precision)
    return replace(found, input=replace(found.input, batch=options.workload.batch))


def require_possible(_: NetworkOptions, source: NetworkSource) -> None:
    """Raise Unsupported or InvalidInput for a network of which nothing can be removed, before anything runs."""
    source.traced  # noqa: B018 (it raises)


def named_inputs(options: NetworkOptions, source: NetworkSource) -> dict[str, str]:
    """Return the digests of the inputs that the options name, by a name for messages."""
    return _inputs_of(options, _shown(options, source))


def _shown(options: NetworkOptions, source: NetworkSource) -> Shown[Any, Any]:
    """Return the photographs or sentences of a job. Raises InvalidInput for those that are of no use."""
    assert options.examples is not None  # nothing is pruned without them
    if isinstance(source.input, ImageInput):
        return shown_photographs(options.examples, model=source.model, input_=source.input)
    assert source.tokenizer is not None
    return shown_sentences(options.examples, tokenizer=source.tokenizer, input_=source.input)


def _inputs_of(options: NetworkOptions, shown: Shown[Any, Any]) -> dict[str, str]:
    found = {
        f"the {shown.KIND} of --calib": shown.searched_sha256,
        f"the {shown.KIND} scored": shown.evaluation.sha256,
    }
    if ":" in options.method:
        found[f"the code of {options.method}"] = code_sha256(options.method)
    if options.table is not None:
        found["the latency table"] = digest(asdict(NetworkTable.read(Path(options.table))))
    return found


def describe(traced: Traced, input_: NetworkInput) -> str:
    """Say in words what of a network can be removed."""
    network, is_of_texts = traced.network, isinstance(input_, TokenInput)
    example = f"a text of {input_}" if is_of_texts else "an image"
    units = "heads and channels" if is_of_texts else "channels"
    said = (
        f"{network.num_parameters / 1e6:.1f} M parameters, {network.flops() / 1e9:.2f} GFLOP {example}; "
        f"{len(network.groups)} groups of {units} can be cut"
    )
    if network.branches:
        said += f" and {len(network.branches)} residual branches removed"
    return f"{said}; layers that keep all their outputs: {len(traced.refusals)}" if traced.refusals else said


def _run(stages: NetworkStages, method: NetworkMethod) -> PruneResult[Any] | None:
    stages = replace(stages, bench=replace(stages.bench, plans=(stages.dense_plan,)))
    dense = stages.artifact(stages.workspace.dense, stages.dense_plan)
    stages = stages.configured(dense)
    if stages.chooses_precision and (reason := why_not_chosen(stages, dense)):
        stages.workspace.log.say(reason)
        stages = replace(stages, bench=replace(stages.bench, precisions=()))
    stages = without_unheld(stages)
    files = dense_files(stages, stages.dense_plan, own=stages.options.workload.precision)
    if files:
        choice = PrecisionChoice(stages=stages, dense=dense, shares=latency_shares(stages, files))
        found = choice.pruned(method)
        return None if found is None else _claim(stages, *found, files)
    goal = stages.goal(dense)
    if goal is None:
        return None
    return _claim(stages, goal, stages.answered(lambda: stages.asked(method, goal)), files)


def _claim(stages: NetworkStages, goal: Goal, pruned: Pruned[Network], files: Files) -> PruneResult[Any]:
    """Shrink, recover and export the network, score it on unseen examples, measure it; return the result.

    `files` are those of the dense network in every precision, which are scored beside it. The network in
    `stages.source` becomes the pruned one on the way, and is recovered where anything was pruned.
    """
    source, workspace, plan = stages.source, stages.workspace, pruned.plan
    model, shown = source.model, stages.shown
    write_json(workspace.folder / "plan.json", encode(plan))
    with workspace.stage("score the dense model"):
        exam = NetworkExam.of(stages)
    is_recovered = stages.options.recovery.mode != "none" and prunes(pruned)
    dense = copy.deepcopy(model) if is_recovered else None
    with workspace.stage("measure batch norms"):
        cut_(model, pruned, shown.trained)
    with workspace.stage("score the pruned model"):
        validated = exam.validation_distance(model)
        shrunk = exam.of_torch(stages, model)
    workspace.log.say(
        f"shrunk, the torch model in floats: {in_words(shrunk.shown)} on {shown.evaluation.name}; {shrunk.DISTANCE} "
        f"{validated:.3f} on the validation split"
    )
    recovered, recovery = shrunk, Recovered()
    if dense is not None:
        recovery = recover_network_(stages, exam, dense, plan, before=validated)
        recovered = exam.of_torch(stages, model)
    with workspace.stage("save the checkpoint"):
        remove(workspace.folder / "checkpoint")  # left by an earlier start
        save_network(model, workspace.folder / "checkpoint", source=source.folder)
    stages = replace(stages, bench=replace(stages.bench, plans=(stages.dense_plan, plan)))
    sizes = _sizes(stages, plan)
    claim = claimed(
        stages,
        goal,
        plan,
        exam,
        in_torch=(exam.dense, recovered),
        sizes=lambda artifact: sizes[artifact.plan_digest],
    )
    result = _result(stages, goal, pruned, claim, shrunk=shrunk, validated=validated)
    return replace(
        result,
        notes=(*result.notes, *recovery.notes),
        recovery_kls=recovery.distances,
        formats=dense_formats(stages, files, exam, in_torch=exam.dense),
    )


def _sizes(stages: NetworkStages, plan: Plan[Network]) -> dict[str, tuple[int, int]]:
    """Return parameters and FLOPs of one run of the dense and of the pruned network, by the digests of their plans."""
    batch = stages.options.workload.batch
    shapes = {stages.dense_plan.digest: stages.network, plan.digest: plan.pruned_architecture()}
    return {digest: (one.num_parameters, batch * one.flops()) for digest, one in shapes.items()}


def _result(
    stages: NetworkStages,
    goal: Goal,
    pruned: Pruned[Network],
    claim: Claim[AnyQuality],
    *,
    shrunk: AnyQuality,
    validated: float,
) -> PruneResult[AnyQuality]:
    shown = stages.shown
    return result_of(
        stages,
        goal,
        pruned,
        claim,
        source=(stages.source.name, stages.source.digest),
        dense_cost=goal.cost_limit.predict({}),
        calibrated=Calibrated(name=shown.name, sha256=shown.searched_sha256, sequences=shown.num_searched),
        validation_distance=validated,
        without_recovery=shrunk.distance,
        recovery=stages.options.recovery.mode if prunes(pruned) else "none",
        notes=stages.source.notes,
    )
