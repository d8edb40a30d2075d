"""KL to the dense model after a few minutes of recovery: what is trained, how fast, on what text, over seeds.

    tools/bench_recovery --pruned runs/mine/checkpoint --data c4.jsonl.gz
    tools/bench_recovery --pruned runs/mine/checkpoint --data c4.jsonl.gz --minutes 3 10 --seeds 1 --only "full, rate"
    tools/bench_recovery --pruned runs/mine/checkpoint --data c4.jsonl.gz --eval-text python-docs wikitext.txt

The pruned model is that of a run without recovery. How many steps fill the minutes is measured first for every variant,
because the rate falls towards the last step. The best state is chosen on held-out text of the same data, and scored on
texts that nothing saw. A killed run goes on behind the variants that are done.
"""

import argparse
import copy
import json
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

from dilap.cli.arguments import Several
from dilap.cli.console import Console, run
from dilap.core.codec import read_json, write_json
from dilap.core.errors import InvalidInput
from dilap.models.builtin import DEFAULT_MODEL
from dilap.models.load import Source, load
from dilap.models.recovery.lessons import StreamedLessons
from dilap.models.recovery.options import RecoveryOptions
from dilap.models.recovery.stream import MIXED, PackedStream
from dilap.models.recovery.train import Recovered, Told, recover_
from dilap.models.reference import Teacher
from dilap.models.text import evaluation_text

_TRIED_STEPS = 6  # from which the steps that fill the minutes are found
_HELD_OUT, _HELD_OUT_LENGTH = 16, 256  # sequences, tokens in each


def _variants() -> Mapping[str, RecoveryOptions]:
    """Return the variants by name: from the defaults, one thing changed at a time."""
    full = RecoveryOptions(mode="full", sequence_length=256, evaluate_every=10**6)
    lora = replace(full, mode="lora")
    found = {"full": full, "lora": lora, "lora, vectors": replace(lora, lora_vectors=True)}
    found |= {f"full, rate {rate:g}": replace(full, full_rate=rate) for rate in (4e-4, 8e-4, 3.2e-3, 6.4e-3)}
    found |= {f"lora, rate {rate:g}": replace(lora, lora_rate=rate) for rate in (2.5e-3, 1e-2, 2e-2)}
    found |= {f"lora, rank {rank}": replace(lora, lora_rank=rank) for rank in (4, 64)}
    found |= {f"full, batch {size}": replace(full, batch_tokens=size) for size in (512, 1024, 4096)}
    found |= {f"full, length {length}": replace(full, sequence_length=length) for length in (128, 512)}
    found |= {f"full, warm-up {share:g}": replace(full, warmup=share) for share in (0.02, 0.3)}
    found |= {f"full, least rate {share:g}": replace(full, least_rate=share) for share in (0.0, 0.5)}
    found |= {f"full, next token {share:g}": replace(full, next_token=share) for share in (0.1, 0.5)}
    return found | {f"full, hidden {weight:g}": replace(full, hidden=weight) for weight in (0.1, 1.0)}


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=DEFAULT_MODEL, help="the dense one")
    parser.add_argument("--pruned", required=True, metavar="CHECKPOINT")
    parser.add_argument("--data", nargs="+", required=True, metavar="TEXT")
    parser.add_argument("--eval-text", nargs="+", default=["python-docs"], metavar="TEXT")
    parser.add_argument("--minutes", action=Several, convert=float, default=[3.0, 10.0, 30.0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only", metavar="PREFIX", help="the variants whose names begin so")
    parser.add_argument("--compute", default="auto")
    parser.add_argument("--out", type=Path, default=Path("runs/bench_recovery"))
    return parser.parse_args()


class Study:
    """One seed: the dense model, the pruned one, held-out text of the data, and the texts on which all are scored."""

    def __init__(self, given: argparse.Namespace, dense: Source, seed: int) -> None:
        self.given, self.dense, self.seed = given, dense, seed
        self.pruned = load(given.pruned, compute=given.compute).model
        held_out = self._stream(RecoveryOptions(sequence_length=_HELD_OUT_LENGTH), seed=seed).take(_HELD_OUT)
        self.validation = Teacher.of(dense.model, held_out)
        texts = (evaluation_text(one, dense.tokenizer, num_sequences=32, length=256) for one in given.eval_text)
        self.exams = {Path(one.name).name: Teacher.of(dense.model, one.tokens) for one in texts}

    def _stream(self, options: RecoveryOptions, *, seed: int) -> PackedStream:
        return PackedStream(self.given.data, self.dense.tokenizer, length=options.sequence_length, seed=seed)

    def score(self, options: RecoveryOptions, minutes: float) -> dict[str, float]:
        """Return the KL on every text after so many minutes, with the steps and the seconds that they took."""
        ends: list[float] = []
        self._recovered(replace(options, steps=_TRIED_STEPS), progress=lambda _: ends.append(time.monotonic()))
        a_step = statistics.median(after - before for before, after in pairwise(ends))
        steps = max(1, round(60 * minutes / a_step))
        start = time.monotonic()
        done, scores = self._recovered(replace(options, steps=steps))
        return {
            **scores,
            "validation": min(done.validation.values()),
            "steps": steps,
            "seconds": time.monotonic() - start,
        }

    def _recovered(
        self, options: RecoveryOptions, *, progress: Callable[[Told], None] = lambda _: None
    ) -> tuple[Recovered, dict[str, float]]:
        model = copy.deepcopy(self.pruned)
        options = replace(options, seed=self.seed, data=tuple(self.given.data))
        stream = self._stream(options, seed=self.seed)
        # What is held out lies anywhere in the first sequences that are mixed.
        stream.take(MIXED * math.ceil(_HELD_OUT_LENGTH / options.sequence_length))
        lessons = StreamedLessons(
            dense=self.dense.model,
            stream=stream,
            num_sequences=options.tokens_in_step // options.sequence_length,
            keep_states=options.hidden > 0,
        )
        with tempfile.TemporaryDirectory() as folder:
            done = recover_(model, lessons, options, validation=self.validation, folder=Path(folder), progress=progress)
        return done, {name: exam.kl(model) for name, exam in self.exams.items()}


def _main() -> int:
    given, console = _arguments(), Console()
    chosen = {name: one for name, one in _variants().items() if name.startswith(given.only or "")}
    if not chosen:
        raise InvalidInput(f"no variant begins with {given.only!r}; there are: {'; '.join(_variants())}")
    dense = load(given.model, compute=given.compute)
    for seed in range(given.seeds):
        study = Study(given, dense, seed)
        console.say(
            f"before: {json.dumps({name: round(exam.kl(study.pruned), 4) for name, exam in study.exams.items()})}"
        )
        for minutes in given.minutes:
            for name, options in chosen.items():
                path = given.out / f"{seed}-{minutes:g}min-{name.replace(', ', '-').replace(' ', '_')}.json"
                if not path.exists():
                    write_json(path, study.score(options, minutes))
                found = read_json(path)
                console.say(f"seed {seed}, {minutes:g} min, {name}: {json.dumps(found)}")
    return 0


if __name__ == "__main__":
    run(_main)
