"""The table of nn-pruning: perplexity on WikiText-2 of OPT (or any other model) with zeros inside its matrices.

    tools/opt_table facebook/opt-125m facebook/opt-350m                      from the hub, as its authors made it
    tools/opt_table ./opt-125m --data-dir data --patterns 0.5 2:4            from local files
    tools/opt_table ./opt-125m --calib-length 512 --calib-sequences 32 --limit 20      smaller and faster

Windows are of 2,048 tokens, calibration is on 128 such windows of C4, inputs are those of the dense model, and weights
are bf16: the authors' choices, and the defaults here. What is done is kept in --out: the same command goes on there.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from dilap import methods
from dilap.cli import arguments
from dilap.cli.arguments import Several, whole
from dilap.cli.console import Console, run, show
from dilap.core.codec import digest, read_json, write_json
from dilap.evaluation.plain_text import WINDOW_TOKENS, wikitext, window_perplexity
from dilap.evaluation.subject import DTYPES
from dilap.evaluation.tasks import load as load_tasks
from dilap.evaluation.tokenizers import HuggingFaceTokenizer
from dilap.evaluation.torch_reader import TorchReader
from dilap.models.load import Source, load
from dilap.models.windows import CORPORA, published_windows
from dilap.sparsity.pattern import Pattern
from dilap.sparsity.rules import RULES, sparsify_

DENSE = "dense"
SEED = 69  # the authors'
_NOT_OF_THE_NUMBERS = ("checkpoints", "patterns", "methods", "out")  # options that change no number of the table


def _given(words: Sequence[str] | None) -> argparse.Namespace:
    made = arguments.parser("Make a table of perplexities with zeros inside matrices.", f"{__doc__}")
    made.add_argument("checkpoints", nargs="+", metavar="MODEL", help="folders or hub ids")
    made.add_argument("--patterns", action=Several, default=["0.5", "2:4", "4:8"], metavar="P")
    made.add_argument("--methods", action=Several, default=list(RULES), metavar="NAME")
    made.add_argument("--propagate", choices=["dense", "pruned"], default="dense", help="what later layers see (dense)")
    made.add_argument("--dtype", choices=list(DTYPES), default="bf16")
    made.add_argument("--calib", choices=list(CORPORA), default="c4")
    made.add_argument("--calib-sequences", type=whole(1, 1 << 20), default=128, metavar="N")
    made.add_argument(
        "--calib-length", type=whole(1, 1 << 20), default=WINDOW_TOKENS, metavar="N", help="of windows too"
    )
    made.add_argument("--limit", type=whole(1, 1 << 20), metavar="N", help="score so many articles; all by default")
    made.add_argument("--data-dir", type=Path, metavar="DIR", help="C4 and WikiText-2 in files; the hub by default")
    made.add_argument("--out", type=Path, default=Path("runs/opt-table"), metavar="DIR")
    return made.parse_args(words)


class Table:
    """The perplexities found so far, by checkpoint and then by row, kept in a file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.found: dict[str, dict[str, float]] = read_json(path) if path.exists() else {}

    def add(self, checkpoint: str, row: str, perplexity: float) -> None:
        self.found.setdefault(checkpoint, {})[row] = perplexity
        write_json(self.path, self.found)

    def markdown(self, rows: Sequence[str]) -> str:
        names = list(self.found)
        lines = [f"| | {' | '.join(Path(name).name for name in names)} |", "|---|" + "--:|" * len(names)]
        for row in rows:
            cells = [f"{self.found[name][row]:.2f}" if row in self.found[name] else "" for name in names]
            lines.append(f"| {row} | {' | '.join(cells)} |")
        return "\n".join(lines)


def _row(checkpoint: str, row: str, text: str, given: argparse.Namespace, console: Console) -> float:
    """Return the perplexity of one row: the dense model's, or that with the zeros that `pattern method` asks for."""
    source = load(checkpoint)
    source.model.to(DTYPES[given.dtype])
    if row != DENSE:
        _sparsify_(source, *row.split(), given=given, console=console)
    reader, words = TorchReader(source.model), HuggingFaceTokenizer(source.tokenizer)
    return window_perplexity(reader, words, text, name="wikitext", window_tokens=given.calib_length).perplexity


def _sparsify_(source: Source, pattern: str, name: str, *, given: argparse.Namespace, console: Console) -> None:
    tokens, _ = published_windows(
        given.calib,
        source.tokenizer,
        train=given.calib_sequences,
        validation=0,
        length=given.calib_length,
        seed=SEED,
        data_dir=given.data_dir,
    )
    rule, parsed = methods.get(name, table=RULES), Pattern.parse(pattern)
    total = source.model.config.num_hidden_layers * tokens.numel()
    with console.bar(f"{pattern} {name}", total=total, unit="tok") as bar:
        sparsify_(source.model, tokens, rule, parsed, propagate=given.propagate, progress=bar.update)


def main(words: Sequence[str] | None = None) -> int:
    given = _given(words)
    (task,) = load_tasks(["wikitext"], data_dir=given.data_dir, num_fewshot=None)
    (documents,) = (one.eval_docs for one in task.tasks.values())
    text = wikitext([row["page"] for row in documents][: given.limit])
    options = {name: str(value) for name, value in vars(given).items() if name not in _NOT_OF_THE_NUMBERS}
    table, console = Table(given.out / f"perplexity-{digest(options)[:8]}.json"), Console()
    rows = [DENSE, *(f"{pattern} {name}" for pattern in given.patterns for name in given.methods)]
    for checkpoint in given.checkpoints:
        for row in rows:
            if row not in table.found.get(checkpoint, {}):
                table.add(checkpoint, row, _row(checkpoint, row, text, given, console))
    show(table.markdown(rows))
    return 0


if __name__ == "__main__":
    run(main)
