"""Several processes at one job, as `torchrun` and `accelerate launch` start them.

The first process runs the job: it alone reads what is asked, writes files, measures and talks to devices. The others
are its helpers. They do only what it tells them: functions that all processes run together, each on its share of a
text, with sums that are added up over all of them.
"""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist
from torch import nn
from transformers import PreTrainedModel

from dilap import __version__
from dilap.core import launched
from dilap.core.errors import DilapError, InvalidInput, Mismatch, Unavailable, Unsupported, reason_of
from dilap.models.compute_device import HOST

if TYPE_CHECKING:
    from torch.distributed.distributed_c10d import Store

T = TypeVar("T")
_PATIENCE = timedelta(days=30)  # helpers wait while the main process measures, for hours; a death is noticed at once
_FOR_THE_MAIN_PROCESS = timedelta(seconds=60)  # to say why the job ends, before a launcher ends it
_FAILED, _ENDED = "dilap/failed", "dilap/ended"  # keys in the store that all processes share


@dataclass(frozen=True, kw_only=True)
class Processes:
    """Processes that run the same function at the same time; `rank` is the number of this one."""

    rank: int = 0
    count: int = 1

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def share(self, rows: torch.Tensor) -> torch.Tensor:
        """Return this process's share of rows: as many as the others' or one more, those of the first come first."""
        return rows.tensor_split(self.count)[self.rank]

    def sum_(self, *tensors: torch.Tensor) -> None:
        """Replace every tensor by its sum over all processes."""
        if self.count > 1:
            for one in tensors:
                dist.all_reduce(one)

    def joined(self, rows: torch.Tensor) -> torch.Tensor:
        """Return the rows of all processes, one process after another, in the host's memory."""
        parts = self.each(rows.to(HOST)) if self.count > 1 else [rows]
        return torch.cat(parts)

    def each(self, value: T) -> list[T]:
        """Return what every process gives, the main one's first."""
        if self.count == 1:
            return [value]
        found: list[Any] = [None] * self.count
        dist.all_gather_object(found, value)
        return found

    def of_main(self, value: T) -> T:
        """Return what the main process gives."""
        if self.count == 1:
            return value
        found = [value]
        dist.broadcast_object_list(found)
        return found[0]

    def wait(self) -> None:
        """Wait until all processes are here."""
        if self.count > 1:
            dist.barrier()


ALONE = Processes()


@dataclass(eq=False)
class Team:
    """The processes of a job, as one of them sees them.

    In a helper, `models` are copies of those that the main process shares, by name, and `kept` is what functions that
    were run together have left for later ones.
    """

    processes: Processes = ALONE
    store: "Store | None" = None
    models: dict[str, PreTrainedModel] = field(default_factory=dict)
    kept: dict[str, Any] = field(default_factory=dict)
    _is_lost: bool = False
    _digests: dict[str, str | None] = field(default_factory=dict)  # of the models that the helpers have, by name

    def together(self, function: Callable[..., T], *given: Any, **own: Any) -> T:
        """Run `function(team, *given)` in all processes, and return what the main one returns.

        In the main process alone it gets the keywords `own` too. The function is one of a module, and what it is given
        can be pickled.
        """
        with self.helped(function, *given):
            return function(self, *given, **own)

    @contextmanager
    def helped(self, function: Callable[..., object], *given: Any) -> Iterator[None]:
        """Let the helpers run `function(team, *given)`, in the context of which the main process does its part.

        Raises Unavailable where one of them failed.
        """
        if self.processes.count == 1:
            yield
            return
        if self._is_lost:
            raise Unavailable("the other processes of this job are lost since an earlier error; run it again")
        try:
            self.processes.of_main((function, given))
            yield
        except BaseException as error:
            self._is_lost = True  # in the middle of something that they do not end without this process
            if said := self._said_of_failure(error):
                raise Unavailable(said) from error
            raise

    def _said_of_failure(self, error: BaseException) -> str:
        """Return what a helper said before it ended; empty for an error of this process's own."""
        if isinstance(error, DilapError) or not isinstance(error, RuntimeError):
            return ""
        assert self.store is not None
        if self.store.check([_FAILED]):
            return str(self.store.get(_FAILED), "utf-8")
        if "Connection closed by peer" in str(error) or "Connection reset by peer" in str(error):
            return "another process of this job was killed; the system's log may say why (memory, for one)"
        return ""

    def share_model(self, name: str, model: PreTrainedModel, *, digest: str | None = None) -> None:
        """Give the helpers a copy of a model, unless they have the one of this `digest` already."""
        if self.processes.count > 1 and (digest is None or digest != self._digests.get(name)):
            _require_own_device(model)
            self.together(_take_model, name, _emptied(model), model.device.type, model=model)
            self._digests[name] = digest

    def forget(self) -> None:
        """Let the helpers drop all that they keep."""
        if self.processes.count > 1:
            self._digests.clear()
            self.together(_forget)

    def help(self) -> None:
        """Do what the main process says, until it ends."""
        told: tuple[Callable[..., object], tuple[Any, ...]] | None
        while (told := self.processes.of_main(None)) is not None:
            function, given = told
            function(self, *given)

    def dismiss(self) -> None:
        """Let the helpers end."""
        if not self._is_lost:
            with suppress(RuntimeError):  # one may have been killed while there was nothing to do
                self.processes.of_main(None)


_alone = Team()
_current = _alone


def team() -> Team:
    """Return the processes of this job."""
    return _current


def with_helpers(job: Callable[[], T]) -> T | None:
    """Run a job in the main process with all others as its helpers; return None in those, when it has ended.

    A process that is alone just runs it. Raises Unavailable where the others cannot be reached, Mismatch for processes
    of different versions, and Unsupported for models that are split among processes.
    """
    if launched.count() == 1 or _current is not _alone:
        return job()
    if engine := launched.engine():
        raise Unsupported(
            f"recovery of several processes is data parallel, each has the whole model: launch them without {engine}"
        )
    with _joined() as made:
        if made.processes.is_main:
            try:
                return job()
            finally:
                made.dismiss()
        made.help()
    return None


@contextmanager
def _joined() -> Iterator[Team]:
    """Join the processes that the launcher started."""
    global _current  # noqa: PLW0603 - there is one group of processes in a process, as there is in torch
    processes = Processes(rank=launched.rank(), count=launched.count())
    store = _connected(processes)
    try:
        _require_same_versions(processes)
        _current = Team(processes=processes, store=store)
        yield _current
    except BaseException as error:
        if not processes.is_main:
            _tell_main(store, f"process {processes.rank} of {processes.count} failed: {reason_of(error)}")
        raise
    finally:
        _current = _alone
        with suppress(RuntimeError):  # the others may be gone
            if processes.is_main:
                store.set(_ENDED, "")
            if dist.is_initialized():
                dist.destroy_process_group()


def _connected(processes: Processes) -> "Store":
    if not dist.is_available():
        raise Unavailable("this build of torch knows no other processes: launch one alone, or install another build")
    from torch.distributed.distributed_c10d import PrefixStore  # noqa: PLC0415 - missing from such builds
    from torch.distributed.rendezvous import rendezvous  # noqa: PLC0415

    accelerator = torch.accelerator.current_accelerator(check_available=True)
    backend = "gloo"
    if accelerator is not None:
        backend = f"{HOST.type}:gloo,{accelerator.type}:{dist.get_default_backend_for_device(accelerator.type)}"
    try:
        store, _, _ = next(rendezvous("env://"))
        dist.init_process_group(
            backend,
            store=PrefixStore("dilap", store),
            rank=processes.rank,
            world_size=processes.count,
            timeout=_PATIENCE,
        )
    except (RuntimeError, ValueError) as error:
        raise Unavailable(f"the {processes.count} processes cannot reach each other: {reason_of(error)}") from error
    found: Store = store
    return found


def _require_same_versions(processes: Processes) -> None:
    versions = processes.each(f"DiLAP {__version__} with torch {torch.__version__}")
    for rank, one in enumerate(versions):
        if one != versions[0]:
            raise Mismatch(
                f"the processes of a job need the same versions: process 0 runs {versions[0]}, process {rank} {one}"
            )


def _tell_main(store: "Store", said: str) -> None:
    """Tell the main process why this one ends, and let it say so before the launcher ends all."""
    with suppress(RuntimeError):  # it may be gone
        store.set(_FAILED, said)
        dist.destroy_process_group()  # its collectives fail, and it looks
        store.wait([_ENDED], _FOR_THE_MAIN_PROCESS)


def _require_own_device(model: PreTrainedModel) -> None:
    """Raise InvalidInput where the main process computes on the accelerator of another one."""
    if model.device != HOST and model.device.index != launched.local_rank():
        raise InvalidInput(
            f"each process of a machine computes on an accelerator of its own, process 0 on the first one and not on "
            f"{model.device}: leave --compute at auto"
        )


def _emptied(model: PreTrainedModel) -> PreTrainedModel:
    """Return a copy of a model whose parameters have no values, and take no memory."""
    known: dict[int, Any] = {id(one): one.detach().to(HOST) for one in model.buffers()}
    for one in model.parameters():
        known[id(one)] = nn.Parameter(torch.empty_like(one, device="meta"), requires_grad=False)
    return copy.deepcopy(model, known)


def _take_model(
    team: Team, name: str, emptied: PreTrainedModel, kind: str, *, model: PreTrainedModel | None = None
) -> None:
    """Give every process the values of the main one's `model`, one parameter after another."""
    if model is None:
        team.kept.clear()  # it is of another model
        device = HOST if kind == HOST.type else torch.device(kind, launched.local_rank())
        model = team.models[name] = _with_room(emptied, device)
    for one in model.parameters():
        dist.broadcast(one.detach(), 0)


def _forget(team: Team) -> None:
    team.models.clear()
    team.kept.clear()


def _with_room(emptied: PreTrainedModel, device: torch.device) -> PreTrainedModel:
    made = {
        one: nn.Parameter(torch.empty_like(one, device=device), requires_grad=False) for one in emptied.parameters()
    }
    for module in emptied.modules():
        for name, one in list(module.named_parameters(recurse=False)):
            setattr(module, name, made[one])  # a head that is the embedding stays so
    return emptied.to(device)
