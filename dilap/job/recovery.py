"""Recovery in a job: what the pruned model learns from, and what became of it."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dilap.core.codec import remove
from dilap.core.errors import InvalidInput
from dilap.job.stages import Stages
from dilap.models.load import Source
from dilap.models.processes import Processes, Team, team
from dilap.models.recovery.lessons import KeptLessons, Lessons, StreamedLessons
from dilap.models.recovery.optimizer import require_8bit_states
from dilap.models.recovery.options import RecoveryOptions
from dilap.models.recovery.stream import Documents, PackedStream
from dilap.models.recovery.train import Recovered, Told, recover_, require_tracker
from dilap.models.reference import Head, Teacher, head_of
from dilap.models.text import Calibration

UNDONE = "recovery is undone, because it did not help"


@dataclass(frozen=True, kw_only=True)
class Dense:
    """What recovery needs of the dense model, taken before it is pruned: answers on kept text, or lessons that ask it.

    `head` is the dense model's.
    """

    head: Head
    kept: Teacher | None = None
    streamed: StreamedLessons | None = None


def require_recovery(options: RecoveryOptions, source: Source) -> None:
    """Raise InvalidInput or Unavailable for a text or a tracker that cannot work, before hours of work begin."""
    require_tracker(options.tracker)
    if options.has_8bit_states:
        require_8bit_states()
    if options.mode != "none" and options.data:
        positions = source.model.config.max_position_embeddings
        if options.sequence_length > positions:
            raise InvalidInput(
                f"packed sequences of {options.sequence_length} tokens are longer than the model's {positions} "
                f"positions; take --recover-length {positions} or less"
            )
        Documents(options.data).require_text()


def of_dense(stages: Stages, text: Calibration) -> Dense | None:
    """Ask the dense model, or keep it, for the recovery that is asked for; None without one."""
    options, model = stages.options.recovery, stages.source.model
    if options.mode == "none":
        return None
    keep_states = stages.chooses_precision or options.hidden > 0
    if not options.data:
        name = "training-states" if keep_states else "training"
        return Dense(head=head_of(model), kept=stages.teacher(name, text.train, keep_states=keep_states))
    streamed = _streamed(copy.deepcopy(model), options, stages.source.tokenizer)
    return Dense(head=head_of(model), streamed=replace(streamed, keep_states=keep_states))


def _streamed(dense: PreTrainedModel, options: RecoveryOptions, words: PreTrainedTokenizerBase) -> StreamedLessons:
    return StreamedLessons(
        dense=dense,
        stream=PackedStream(options.data, words, length=options.sequence_length, seed=options.seed),
        num_sequences=options.tokens_in_step // options.sequence_length,
    )


def recover(stages: Stages, dense: Dense, validation: Teacher) -> Recovered:
    """Distil the dense model into the pruned one, in place, and return how that went.

    Where that never lowers the KL on the validation split it is undone, and a line says so.
    """
    options, model = stages.options.recovery, stages.source.model
    folder, total = stages.workspace.cache / "recovery", options.num_steps
    with stages.workspace.stage("recover"), stages.workspace.log.bar("recover", total=total, unit="step") as bar:

        def show(told: Told) -> None:
            bar.set_postfix(kl=f"{told.kl:.3f}", tokens=f"{told.tokens_per_second:,.0f}/s")
            bar.update(told.step - bar.n)

        lessons = _lessons(dense, stages)
        with _helped(stages, lessons, validation=validation, folder=folder) as processes:
            done = recover_(
                model, lessons, options, validation=validation, folder=folder, processes=processes, progress=show
            )
    remove(folder)
    stages.workspace.log.say(_words(done, options))
    if done.best_step == 0:
        stages.workspace.log.say(UNDONE)
    return done


def _lessons(dense: Dense, stages: Stages) -> KeptLessons | StreamedLessons:
    """Return the lessons, for a model whose head may be another than the dense one's where precisions are chosen."""
    options, own = stages.options.recovery, head_of(stages.source.model)
    if dense.streamed is not None:
        return replace(dense.streamed, heads=(own, dense.head)) if stages.chooses_precision else dense.streamed
    assert dense.kept is not None
    faced = dense.kept.facing(own, dense_head=dense.head) if stages.chooses_precision else dense.kept
    return KeptLessons(faced, batch_tokens=options.batch_tokens, seed=options.seed)


@contextmanager
def _helped(
    stages: Stages, lessons: KeptLessons | StreamedLessons, *, validation: Teacher, folder: Path
) -> Iterator[Processes]:
    """Let all processes of the job take part in a recovery of the model in `stages`."""
    options, source, ours = stages.options.recovery, stages.source, team()
    ours.forget()
    ours.share_model("pruned", source.model)
    read: KeptLessons | _Stream
    if isinstance(lessons, StreamedLessons):
        ours.share_model("dense", lessons.dense)
        read = _Stream(words=source.tokenizer, keep_states=lessons.keep_states, has_heads=lessons.heads is not None)
    else:
        read = lessons
    with ours.helped(_take_part, read, options, validation, folder):
        yield ours.processes
    ours.forget()


@dataclass(frozen=True, kw_only=True)
class _Stream:
    """What a helper needs to know to read the text of `StreamedLessons` itself."""

    words: PreTrainedTokenizerBase
    keep_states: bool
    has_heads: bool


def _take_part(
    ours: Team, read: KeptLessons | _Stream, options: RecoveryOptions, validation: Teacher, folder: Path
) -> None:
    """Let a helper take part in a recovery."""
    model = ours.models["pruned"]
    lessons: Lessons
    if isinstance(read, _Stream):
        dense = ours.models["dense"]
        heads = (head_of(model), head_of(dense)) if read.has_heads else None
        lessons = replace(_streamed(dense, options, read.words), heads=heads, keep_states=read.keep_states)
    else:
        lessons = read
    recover_(model, lessons, options, validation=validation, folder=folder, processes=ours.processes)


def _words(done: Recovered, options: RecoveryOptions) -> str:
    """Say how it went."""
    own = f"{done.kls[0]:.3f} -> {done.kls[-1]:.3f}" if done.kls else "no number"
    before, after = done.validation[0], done.validation[done.best_step]
    return (
        f"recovery ({options.mode}): KL on its own text {own}, on the validation split {before:.3f} -> {after:.3f} "
        f"after step {done.best_step} of {options.num_steps}"
    )
