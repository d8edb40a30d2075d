"""The calibration text of a run, which is made once and kept for its later starts."""

from dilap.job.run_folder import Workspace
from dilap.models.load import Source
from dilap.models.options import CalibrationOptions
from dilap.models.tensor_file import load_tensors, save_tensors
from dilap.models.text import Calibration, calibration


def calibration_text(source: Source, options: CalibrationOptions, workspace: Workspace) -> Calibration:
    """Return the text that `options` ask for, from the workspace where it was made before."""
    path = workspace.common / "calibration.safetensors"
    if not path.exists():
        total = (options.train_sequences + options.validation_sequences) * options.sequence_length
        with workspace.stage("calibration text"), workspace.log.bar("calibration", total=total, unit="tok") as bar:
            text = calibration(source.model, source.tokenizer, options, progress=bar.update)
            save_tensors(path, {"train": text.train, "validation": text.validation})
    tensors = load_tensors(path)
    return Calibration(name=options.source, train=tensors["train"], validation=tensors["validation"])
