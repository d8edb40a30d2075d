"""Evaluate an image network on photographs, by itself and beside another one."""

from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from dilap.backends import host
from dilap.core.codec import encode, write_json
from dilap.core.errors import InvalidInput
from dilap.core.progress import Progress
from dilap.evaluation.document import ImageEvaluation
from dilap.evaluation.image_quality import compare_on_images
from dilap.evaluation.image_subject import open_image_subject
from dilap.job.result import versions
from dilap.models.images import read_images


@dataclass(frozen=True, kw_only=True)
class ImageOptions:
    """What is shown to which network: `subject` and `reference` are those of `open_image_subject`."""

    subject: str
    images: str
    reference: str | None = None
    threads: int | None = None
    out: Path | None = None


def evaluate_on_images(options: ImageOptions, *, progress: Progress) -> ImageEvaluation:
    """Show all photographs to the subject and to the reference, and keep the result in the file `out`.

    Raises InvalidInput, also where nothing can be said because there is no reference and no photograph has a label.
    """
    threads = options.threads or host.num_physical_cores()
    with ExitStack() as stack:
        subject = open_image_subject(options.subject, threads=threads)
        stack.callback(subject.close)
        reference = None
        if options.reference is not None:
            reference = open_image_subject(options.reference, input_=subject.input, threads=threads)
            stack.callback(reference.close)
        classes = {**subject.classes, **(reference.classes if reference else {})}
        images = read_images(options.images, classes=classes, num_classes=subject.num_classes)
        if images.labels is None and reference is None:
            raise InvalidInput(
                f"{images.name}: no photograph has a label; give labels, or a --reference to compare with"
            )
        with progress.bar("photographs", total=len(images), unit="img") as bar:
            quality = compare_on_images(
                subject.network,
                reference.network if reference else None,
                images,
                input_=subject.input,
                progress=bar.update,
            )
    found = ImageEvaluation(
        model=subject.name,
        backend=subject.backend,
        precision=subject.precision,
        digest=subject.digest,
        plan_digest=subject.plan_digest,
        threads=threads,
        versions=versions(),
        quality=quality,
        reference=reference.name if reference else "",
        reference_digest=reference.digest if reference else "",
    )
    if options.out is not None:
        write_json(options.out, encode(found))
    return found
