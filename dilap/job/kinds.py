"""The kinds of models that jobs are about, and what those who start jobs ask of each."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from dilap.job import forecast, network_forecast, network_profile, network_prune, profile, prune
from dilap.job.forecast import Machine, Need
from dilap.job.network_options import NetworkOptions
from dilap.job.options import CommonOptions
from dilap.job.profile import Profile
from dilap.job.result import PruneResult
from dilap.methods import METHODS, NETWORK_METHODS


@dataclass(frozen=True, kw_only=True)
class Kind:
    """A kind of model: its methods by name, and functions of a job's options and the loaded model.

    `require_possible` raises for what no method could do; `named_inputs` returns the digests of what a job reads beside
    its model; `prune` is `dilap.job.prune.prune` or its like, and `profile` is `dilap.job.profile.profile` or its like;
    `forecast` says what jobs of the model will need, and on which machine, before any runs.
    """

    methods: Mapping[str, str]
    load: Callable[[Any], Any]
    require_possible: Callable[[Any, Any], None]
    named_inputs: Callable[[Any, Any], Mapping[str, str]]
    prune: Callable[..., PruneResult[Any] | None]
    profile: Callable[..., Profile[Any]]
    forecast: Callable[[Any], tuple[Callable[[Any], list[Need]], Machine]]


DECODERS = Kind(
    methods=METHODS,
    load=prune.load_source,
    require_possible=prune.require_possible,
    named_inputs=prune.named_inputs,
    prune=prune.prune,
    profile=profile.profile,
    forecast=forecast.of_job,
)
NETWORKS = Kind(
    methods=NETWORK_METHODS,
    load=network_prune.load_source,
    require_possible=network_prune.require_possible,
    named_inputs=network_prune.named_inputs,
    prune=network_prune.prune_network,
    profile=network_profile.profile_network,
    forecast=network_forecast.of_job,
)


def kind_of(options: CommonOptions) -> Kind:
    """Return the kind of model that a job is about."""
    return NETWORKS if isinstance(options, NetworkOptions) else DECODERS
