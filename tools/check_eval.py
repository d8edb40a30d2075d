"""Do a model in torch and its artifacts give the same answers and perplexities?

    tools/check_eval --data-dir data                               every task, f32 through three runtimes
    tools/check_eval --data-dir data --limit 20 --tasks arc_easy,wikitext
    tools/check_eval --data-dir data --also llamacpp:q4_0          reported beside them, not judged

Artifacts and evaluations are kept in --work and not made again: a killed check goes on where it stopped. An f32
artifact passes with the same answer to 99 % of the rows of every task and perplexities within 0.1 %; exit code 1 where
one fails.
"""

import argparse
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from dilap.cli.arguments import Several
from dilap.cli.console import run
from dilap.core.codec import decode, read_json
from dilap.core.errors import InvalidInput
from dilap.evaluation.document import TASKS, Evaluation
from dilap.models.builtin import DEFAULT_MODEL

F32 = ("llamacpp:f32", "onnxruntime:f32", "executorch:f32")
_COMMAND = "import sys; from dilap.cli.{} import main; main()"


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """How an artifact compares with torch on a task.

    `same` is the share of equal answers, `off` the largest relative error of a perplexity; None where there is none.
    """

    artifact: str
    task: str
    num_rows: int
    same: float | None
    off: float | None

    @property
    def is_close(self) -> bool:
        return (self.same is None or self.same >= 0.99) and (self.off is None or self.off <= 1e-3)


def agreements(name: str, reference: Evaluation, found: Evaluation) -> Iterator[Agreement]:
    """Yield how `found` compares with `reference`, task by task. Raises InvalidInput where their rows differ."""
    for task, metrics in found.tasks.items():
        theirs, mine = reference.facts[task], found.facts[task]
        if theirs.data_sha256 != mine.data_sha256:
            raise InvalidInput(f"{task}: {name} was scored on other rows than torch; remove its evaluation")
        pairs = [
            pair for part, answers in mine.choices.items() for pair in zip(answers, theirs.choices[part], strict=True)
        ]
        errors = [
            abs(value / reference.tasks[task][metric] - 1)
            for metric, value in metrics.items()
            if metric.endswith("perplexity")
        ]
        yield Agreement(
            artifact=name,
            task=task,
            num_rows=mine.num_rows,
            same=sum(one == other for one, other in pairs) / len(pairs) if pairs else None,
            off=max(errors, default=None),
        )


def table(rows: Sequence[Agreement], judged: Sequence[str]) -> str:
    """Return the agreements as a table in Markdown."""
    lines = ["| artifact | task | rows | same answer | perplexity off by | |", "|---|---|--:|--:|--:|---|"]
    for row in rows:
        verdict = "reported" if row.artifact not in judged else "ok" if row.is_close else "FAILS"
        same = "" if row.same is None else f"{row.same:.2%}"
        off = "" if row.off is None else f"{row.off:.4%}"
        lines.append(f"| {row.artifact} | {row.task} | {row.num_rows} | {same} | {off} | {verdict} |")
    return "\n".join(lines)


def _call(command: str, *arguments: object) -> None:
    words = [sys.executable, "-c", _COMMAND.format(command), *map(str, arguments)]
    if subprocess.run(words, check=False).returncode:
        raise InvalidInput(f"dilap-{command} failed; its own line above says why")


def _evaluation(subject: Path | str, out: Path, given: argparse.Namespace) -> Evaluation:
    arguments = ["--tasks", ",".join(given.tasks), "--data-dir", given.data_dir, "--max-length", given.max_length]
    arguments += ["--limit", given.limit] if given.limit else []
    arguments += ["--threads", given.threads] if given.threads else []
    arguments += ["--precision", "f32"] if out.stem == "torch" else []
    _call("eval", subject, *arguments, "--out", out)
    return decode(Evaluation, read_json(out), source=str(out))


def _main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=DEFAULT_MODEL)
    parser.add_argument("--tasks", action=Several, default=[one for one in TASKS if one != "ptb"])
    parser.add_argument("--data-dir", required=True)
    parser.add_argument("--limit", type=int)
    parser.add_argument("--max-length", type=int, default=2048, help="what ExecuTorch's programs hold (2048)")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--artifacts", nargs="+", default=F32, metavar="RUNTIME:f32", help=f"({' '.join(F32)})")
    parser.add_argument("--also", nargs="*", default=[], metavar="RUNTIME:PRECISION")
    parser.add_argument("--work", type=Path, default=Path("runs/check_eval"))
    given = parser.parse_args()
    reference = _evaluation(given.model, given.work / "torch.json", given)
    rows: list[Agreement] = []
    for name in (*given.artifacts, *given.also):
        backend, _, precision = name.partition(":")
        folder = given.work / f"{backend}-{precision}"
        if not folder.exists():
            _call("export", given.model, "--backend", backend, "--precision", precision, "--out", folder)
        rows += agreements(name, reference, _evaluation(folder, given.work / f"{folder.name}.json", given))
        print(table(rows, given.artifacts))
    return 0 if all(row.is_close for row in rows if row.artifact in given.artifacts) else 1


if __name__ == "__main__":
    run(_main)
