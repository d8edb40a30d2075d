"""A recovery on kept text, as tests ask for it."""

import tempfile
from collections.abc import Callable
from pathlib import Path

from transformers import PreTrainedModel

from dilap.models.recovery.lessons import KeptLessons, Lessons
from dilap.models.recovery.options import RecoveryOptions
from dilap.models.recovery.train import Recovered, Told, recover_
from dilap.models.reference import Teacher


def distil(
    model: PreTrainedModel,
    teacher: Teacher,
    options: RecoveryOptions,
    *,
    lessons: Lessons | None = None,
    folder: Path | None = None,
    progress: Callable[[Told], None] = lambda _: None,
) -> Recovered:
    """Recover a model on the teacher's own text, which is its validation text too."""
    lessons = lessons or KeptLessons(teacher, batch_tokens=options.batch_tokens, seed=options.seed)
    with tempfile.TemporaryDirectory() as temporary:
        place = folder or Path(temporary)
        return recover_(model, lessons, options, validation=teacher, folder=place, progress=progress)
