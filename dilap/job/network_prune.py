"""The main job for image networks: prune one to a budget, and measure the smaller network."""

import copy
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

from torch import nn

from dilap import __version__, methods
from dilap.backends.inputs import random_images
from dilap.core.codec import encode, remove, write_json
from dilap.core.errors import Unsupported
from dilap.core.graph import Network
from dilap.core.images import ImageInput
from dilap.core.network_input import TokenInput
from dilap.core.plan import Plan
from dilap.core.progress import Progress
from dilap.job import ending
from dilap.job.claims import Calibrated, Claim, claimed, result_of
from dilap.job.common_stages import Goal
from dilap.job.inputs import code_sha256
from dilap.job.network_bench import NetworkBench
from dilap.job.network_exam import NetworkExam
from dilap.job.network_options import NetworkOptions
from dilap.job.network_recovery import Recovered, recover_
from dilap.job.network_stages import NetworkStages
from dilap.job.photographs import GUESSED, Shown, shown_photographs, usual_input
from dilap.job.quality import PhotoQuality
from dilap.job.result import PruneResult
from dilap.job.run_folder import Workspace
from dilap.methods import NETWORK_METHODS
from dilap.models.convolutional.cut import shrink_network_, tensors_of
from dilap.models.convolutional.load import NetworkSource, load_network, save_network
from dilap.models.convolutional.network import Traced
from dilap.models.convolutional.recalibration import recalibrate_
from dilap.models.distil_network import distil_network
from dilap.models.network import TorchNetwork, classes_of
from dilap.profilers.devices.device import Device
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
) -> PruneResult[PhotoQuality] | None:
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
    )
    with workspace.stage("load the model"):
        source = source or load_source(options)
        traced = source.traced
    with workspace.stage("find the photographs"):
        shown = _shown(options, source)
    identity = {"options": asdict(options), "model": source.digest, "dilap": __version__}
    with workspace.opened({**identity, "inputs": _inputs_of(options, shown)}):
        for line in (f"{source.name}: {describe(traced)}", *source.notes, describe_photographs(shown)):
            workspace.log.say(line)
        stages = NetworkStages(
            options=options, workspace=workspace, bench=bench, source=source, network=traced.network, shown=shown
        )
        result = _run(stages, method)
        if result is not None:
            workspace.log.keep(ending.text(result))
        workspace.end(None if result is None else encode(result))
    return result


def load_source(options: NetworkOptions) -> NetworkSource:
    """Load the network of a job, which takes as many images at once as the job's workload has.

    Where nobody says how photographs become its inputs, they are taken as most networks take them, with a note.
    """
    found = load_network(
        options.model,
        input_=options.input,
        processor=None if options.processor is None else Path(options.processor),
        weights=options.weights,
    )
    if isinstance(found.input, TokenInput):
        raise Unsupported(
            f"{options.model} is an encoder of texts: dilap-export and dilap-eval take it, dilap-prune does not yet"
        )
    notes = found.notes if found.input.preprocessing is not None else (GUESSED,)
    return replace(found, input=replace(usual_input(found.input), batch=options.workload.batch), notes=notes)


def require_possible(_: NetworkOptions, source: NetworkSource) -> None:
    """Raise Unsupported or InvalidInput for a network of which nothing can be removed, before anything runs."""
    source.traced  # noqa: B018 (it raises)


def named_inputs(options: NetworkOptions, source: NetworkSource) -> dict[str, str]:
    """Return the digests of the inputs that the options name, by a name for messages."""
    return _inputs_of(options, _shown(options, source))


def _shown(options: NetworkOptions, source: NetworkSource) -> Shown:
    """Return the photographs of a job. Raises InvalidInput for those that are of no use."""
    assert isinstance(source.input, ImageInput)
    logits = TorchNetwork(source.model).outputs(random_images((1, *source.input.size)))
    return shown_photographs(
        options.photographs, input_=source.input, classes=classes_of(source.model), num_classes=logits.shape[1]
    )


def _inputs_of(options: NetworkOptions, shown: Shown) -> dict[str, str]:
    found = {"the photographs of --calib": shown.searched_sha256, "the photographs scored": shown.evaluation.sha256}
    if ":" in options.method:
        found[f"the code of {options.method}"] = code_sha256(options.method)
    return found


def describe(traced: Traced) -> str:
    """Say in words what of a network can be removed."""
    network = traced.network
    said = (
        f"{network.num_parameters / 1e6:.1f} M parameters, {network.flops() / 1e9:.2f} GFLOP an image; "
        f"{len(network.groups)} groups of channels can be cut"
    )
    if network.branches:
        said += f" and {len(network.branches)} residual branches removed"
    return f"{said}; layers that keep all their outputs: {len(traced.refusals)}" if traced.refusals else said


def describe_photographs(shown: Shown) -> str:
    labels = "with labels" if shown.evaluation.labels is not None else "without labels"
    return (
        f"photographs: {len(shown.train)} to calibrate on and {len(shown.validation)} to judge recovery by, of "
        f"{shown.name}; {len(shown.evaluation)} to score on, of {shown.evaluation.name}, {labels}"
    )


def _run(stages: NetworkStages, method: NetworkMethod) -> PruneResult[PhotoQuality] | None:
    stages = replace(stages, bench=replace(stages.bench, plans=(stages.dense_plan,)))
    dense = stages.artifact(stages.workspace.dense, stages.dense_plan)
    stages = stages.configured(dense)
    goal = stages.goal(dense)
    if goal is None:
        return None
    return _claim(stages, goal, stages.prune(method, goal))


def _claim(stages: NetworkStages, goal: Goal, pruned: Pruned[Network]) -> PruneResult[PhotoQuality]:
    """Shrink, recover and export the network, score it on unseen photographs, measure it; return the result.

    The network in `stages.source` becomes the pruned one on the way.
    """
    source, workspace, plan = stages.source, stages.workspace, pruned.plan
    model, shown = source.model, stages.shown
    write_json(workspace.folder / "plan.json", encode(plan))
    with workspace.stage("score the dense model"):
        exam = NetworkExam.of(stages)
    dense = None if stages.options.recovery.mode == "none" else copy.deepcopy(model)
    shrink_network_(model, plan, parameters=pruned.parameters)
    with workspace.stage("measure batch norms"):
        recalibrate_(model, shown.train_pixels)
    with workspace.stage("score the pruned model"):
        validation_kl = exam.validation_kl(model)
        shrunk = exam.of_torch(stages, model)
    workspace.log.say(
        f"shrunk, the torch model in floats: KL {shrunk.kl:.3f} on {shown.evaluation.name}, {validation_kl:.3f} on the "
        "validation split"
    )
    recovered, recovery = shrunk, Recovered()
    if dense is not None:
        recovery = _recover_(stages, exam, dense, before=validation_kl)
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
    result = _result(stages, goal, pruned, claim, shrunk=shrunk, validation_kl=validation_kl)
    return replace(result, notes=(*result.notes, *recovery.notes), recovery_kls=recovery.kls)


def _recover_(stages: NetworkStages, exam: NetworkExam, dense: nn.Module, *, before: float) -> Recovered:
    """Distil the dense network into the pruned one, in place; `before` is the KL on the validation split until then."""
    options, model = stages.options.recovery, stages.source.model
    return recover_(
        stages.workspace,
        lambda: tensors_of(model).items(),
        lambda show: distil_network(model, dense, stages.shown.train_pixels, options, progress=show),
        name=options.mode,
        steps=options.steps,
        before=before,
        validation_kl=lambda: exam.validation_kl(model),
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
    claim: Claim[PhotoQuality],
    *,
    shrunk: PhotoQuality,
    validation_kl: float,
) -> PruneResult[PhotoQuality]:
    shown = stages.shown
    return result_of(
        stages,
        goal,
        pruned,
        claim,
        source=(stages.source.name, stages.source.digest),
        dense_cost=goal.cost_limit.predict({}),
        calibrated=Calibrated(name=shown.name, sha256=shown.searched_sha256, sequences=shown.num_searched),
        validation_kl=validation_kl,
        kl_without_recovery=shrunk.kl,
        recovery=stages.options.recovery.mode,
        notes=stages.source.notes,
    )
