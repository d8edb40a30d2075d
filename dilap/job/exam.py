"""Scores of a job's models on text that no search saw: torch models in floats, artifacts through their runtime."""

from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path

from transformers import PreTrainedModel

from dilap.backends import Reader, host
from dilap.backends.readers import open_reader
from dilap.core.artifact import Artifact
from dilap.core.codec import digest
from dilap.evaluation.kept_tokens import KeptTokens
from dilap.evaluation.scoring import beside_teacher
from dilap.evaluation.subject import require_unchanged
from dilap.job.quality import Quality, kept_quality
from dilap.job.result import versions
from dilap.job.stages import Stages
from dilap.models.reference import Head, Scores, Teacher, head_of
from dilap.models.text import Calibration, EvaluationText, evaluation_text


@dataclass(frozen=True, kw_only=True)
class Exam:
    """The text on which all models of a job are scored, with the answers of the dense torch model.

    `reference` has its answers on `text`, `validation` those on the validation split of the calibration text, and
    `dense_head` is its head, which rounding may change.
    """

    text: EvaluationText
    reference: Teacher
    validation: Teacher
    dense_head: Head

    @classmethod
    def of(cls, stages: Stages, calibration: Calibration) -> "Exam":
        """Read the text and ask the dense model: the model in `stages.source` must not be pruned yet."""
        options = stages.options
        text = evaluation_text(
            options.evaluation_text,
            stages.source.tokenizer,
            num_sequences=options.evaluation_sequences,
            length=options.calibration.sequence_length,
        )
        rounds = stages.chooses_precision
        return cls(
            text=text,
            reference=stages.teacher("unseen-states", text.tokens, keep_states=True),
            validation=stages.teacher(
                "validation-states" if rounds else "validation", calibration.validation, keep_states=rounds
            ),
            dense_head=head_of(stages.source.model),
        )

    def facing(self, model: PreTrainedModel) -> "Exam":
        """Return the exam for models that have the head of `model`, which may be another one than the dense model's."""
        if self.validation.states is None:
            return self
        head = head_of(model)
        return replace(
            self,
            reference=self.reference.facing(head, dense_head=self.dense_head),
            validation=self.validation.facing(head, dense_head=self.dense_head),
        )

    @property
    def dense(self) -> Quality:
        """Quality of the dense torch model, which all others are compared with."""
        return self._quality(kl=0.0, perplexity=self.reference.perplexity)

    def of_torch(self, model: PreTrainedModel) -> Quality:
        """Score a torch model that has the head which this exam is for: the dense model's, or see `facing`."""
        return self._scored(self.reference.scores(model))

    def of_artifact(self, stages: Stages, folder: Path, artifact: Artifact, *, in_torch: Quality) -> Quality:
        """Score an exported file, read through its runtime on this machine; the score of a file is kept.

        Where only the file's device can read it, or the runtime crashes on it, the quality `in_torch` is returned with
        the reason, so that hours of pruning are not lost. Raises InvalidInput or Mismatch where a file of the artifact
        is missing or was changed.
        """
        require_unchanged(folder, artifact)
        path = stages.workspace.common / f"quality-{self._key(stages, artifact)}.json"
        return kept_quality(
            path, lambda: self._read(stages, folder, artifact), in_torch=in_torch, sha256=artifact.sha256
        )

    def _read(self, stages: Stages, folder: Path, artifact: Artifact) -> Quality:
        total = self.text.tokens.numel()
        reader: Reader = open_reader(
            artifact.backend,
            folder / artifact.path,
            threads=host.num_physical_cores(),
            switches=stages.bench.workload.switches,
        )
        vocabulary = stages.source.vocabulary
        if vocabulary is not None and folder == stages.workspace.dense:  # it has all tokens, and the text few of them
            reader = KeptTokens(reader, vocabulary.kept.numpy())
        with closing(reader), stages.workspace.log.bar(f"read {folder.name}", total=total, unit="tok") as bar:
            scores = beside_teacher(reader, self.reference, self.dense_head, progress=bar.update)
        return replace(self._scored(scores), through=artifact.backend, artifact_sha256=artifact.sha256)

    def _key(self, stages: Stages, artifact: Artifact) -> str:
        """Return a digest of everything that the score of an artifact depends on."""
        switches = stages.bench.workload.switches
        made_of = [artifact.sha256, artifact.companions, switches, self.text.sha256, stages.source.digest, versions()]
        return digest(made_of)[:16]

    def _scored(self, scores: Scores) -> Quality:
        return self._quality(kl=scores.kl, perplexity=scores.perplexity)

    def _quality(self, *, kl: float, perplexity: float) -> Quality:
        return Quality.on(self.text, kl=kl, perplexity=perplexity)
