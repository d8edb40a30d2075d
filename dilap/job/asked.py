"""From the options of a command or a call to a job: that of a decoder, or that of another network."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from dilap.core.errors import InvalidInput
from dilap.core.workload import Budget
from dilap.job.kinds import kind_of
from dilap.job.network_options import NetworkOptions, network_options
from dilap.job.networks import in_words, is_network, reads_texts
from dilap.job.options import CommonOptions, JobOptions, job_options
from dilap.job.profile import Profile
from dilap.job.result import PruneResult
from dilap.profilers.devices.device import Device

_ASKED_APART = {"device", "budget", "model"}


def options_of(make: Callable[..., object]) -> dict[str, Any]:
    """Return the options by name that a job is made of, with their defaults."""
    parameters = inspect.signature(make).parameters
    return {name: one.default for name, one in parameters.items() if name not in _ASKED_APART}


OPTIONS = options_of(job_options) | options_of(network_options)


def asked_job(*, device: Device, budget: Budget, model: str, given: Mapping[str, Any]) -> JobOptions | NetworkOptions:
    """Return the job that the options `given` ask for; the method is by default that of the model's kind.

    A network that is no decoder is every model that is one, or has an `input_`. Options that are None or at their
    defaults need not apply to the model. Raises InvalidInput for unknown ones, and for others that do not apply to it.
    """
    job = _options_for(device=device, budget=budget, model=model, given=given)
    if isinstance(job, NetworkOptions) and job.examples is None:
        examples = "sentences: give a text" if reads_texts(model) else "photographs: give a folder of them"
        raise InvalidInput(f"{in_words(model)} is pruned with {examples} as --calib")
    return job


def timed_job(*, device: Device, model: str, given: Mapping[str, Any]) -> JobOptions | NetworkOptions:
    """Return a job whose latency table alone is measured, which the options `given` are about; see `asked_job`."""
    return _options_for(device=device, budget=Budget(fraction=1.0), model=model, given=given)


def _options_for(
    *, device: Device, budget: Budget, model: str, given: Mapping[str, Any]
) -> JobOptions | NetworkOptions:
    if odd := sorted(set(given) - set(OPTIONS)):
        raise InvalidInput(f"there is no option {odd[0]!r}; there are: {', '.join(sorted(OPTIONS))}")
    given = {name: value for name, value in given.items() if value is not None}
    is_other = "input_" in given or is_network(model)
    kinds: tuple[Callable[..., JobOptions | NetworkOptions], ...] = (job_options, network_options)
    make, other = reversed(kinds) if is_other else kinds
    known, others = options_of(make), options_of(other)
    for name in sorted(set(given) - set(known)):
        if given[name] != others[name]:
            kind = in_words(model) if is_other else f"{model}, which is neither an image network nor an encoder"
            flag = name.rstrip("_").replace("_", "-")
            raise InvalidInput(f"--{flag} does not apply to {kind}: leave it away")
    chosen = {name: value for name, value in given.items() if name in known}
    return make(device=device, budget=budget, model=model, **chosen)


def start(options: CommonOptions, **given: Any) -> PruneResult[Any] | None:
    """Run a job, whatever its model is; what is `given` beside its options is that of `dilap.job.prune.prune`."""
    return kind_of(options).prune(options, **given)


def profile(options: CommonOptions, **given: Any) -> Profile[Any]:
    """Measure the latency table of a job's model; what is `given` is that of `dilap.job.profile.profile`."""
    return kind_of(options).profile(options, **given)
