"""What the arguments of the methods that DiLAP grew from are called here: FLAP, LLM-Barber, nn-pruning, SPRINT.

    tools/seed_table              the tables of dilap/README.md

A test gives every option in them to the command that it is of, and looks up every name.
"""

import argparse
import shlex
from collections.abc import Sequence
from dataclasses import dataclass

from dilap.cli.console import run, show


@dataclass(frozen=True, kw_only=True)
class Entry:
    """An argument of a seed, and what does the same here.

    Either `options` of the seed's `command` do, or `name`, an attribute of the package (`dilap.sparsity.pruner:Pruner`)
    or a file of the project; `remark` says what differs.
    """

    argument: str
    options: str = ""
    name: str = ""
    remark: str = ""

    def __post_init__(self) -> None:
        assert self.options or self.name or self.remark, self.argument

    @property
    def here(self) -> str:
        words = ", ".join(f"`{one}`" for one in (self.options, self.name) if one)
        return "; ".join(filter(None, (words, self.remark)))


@dataclass(frozen=True, kw_only=True)
class Seed:
    """A method, the command here that does its work, and its arguments."""

    name: str
    command: str
    entries: tuple[Entry, ...]

    def words_of(self, entry: Entry) -> list[str]:
        """Return the words of the command with an entry's options, without the program's name."""
        return shlex.split(f"{self.command} {entry.options}")[1:]

    def markdown(self) -> str:
        rows = [f"| `{entry.argument}` | {entry.here} |" for entry in self.entries]
        return "\n".join([f"**{self.name}**: `{self.command}`", "", "| argument | here |", "|---|---|", *rows])


_MODEL = Entry(argument="model", options="--model ./my-llama", remark="a folder, a GGUF file or a hub id")
_SEED = Entry(argument="seed", options="--seed 0")
_NSAMPLES = Entry(argument="nsamples", options="--calib-sequences 128")
_CACHE = Entry(argument="cache_dir", remark="the hub's own: `$HF_HOME`")

FLAP = Seed(
    name="FLAP",
    command="dilap-prune --target host_cpu --ratio 0.2 --method flap --calib wikitext2",
    entries=(
        _MODEL,
        _SEED,
        Entry(argument="nsamples", options="--calib-sequences 1024 --calib-length 128 --set nsamples=1024"),
        Entry(argument="pruning_ratio", options="--ratio 0.2", remark="or `--budget 70%` of the measured latency"),
        Entry(argument="remove_heads", options="--set structure=AL-MM --set remove_heads=380"),
        Entry(argument="metrics", options="--set metric=WIFV"),
        Entry(argument="structure", options="--set structure=AL-AM"),
        Entry(argument="prune_method", options="--method flap", remark="`wanda_sp`; `mag_sp` is `magnitude`"),
        Entry(argument="unstr", options="--set masks_only=true", remark="nothing gets faster"),
        Entry(
            argument="eval",
            options="--eval-text test.txt",
            remark="every run is scored; `dilap-eval RUN --tasks wikitext`",
        ),
        Entry(argument="save_model", options="--out runs/flap", remark="its `checkpoint/` loads in transformers"),
        _CACHE,
    ),
)
BARBER = Seed(
    name="LLM-Barber (AutoPrune)",
    command="dilap-prune --pattern 0.5 --method wanda --rebuild barber --calib c4",
    entries=(
        _MODEL,
        _SEED,
        _NSAMPLES,
        Entry(argument="seqlen", options="--calib-length 2048"),
        Entry(argument="sparsity_ratio", options="--pattern 0.5"),
        Entry(argument="sparsity_type", options="--pattern 2:4", remark="N of M are kept"),
        Entry(
            argument="prune_method", options="--method wanda", remark="or `magnitude`, `sparsegpt`, a rule of your own"
        ),
        Entry(argument="prune_barber", options="--rebuild barber"),
        Entry(argument="prune_metric", options="--metric WD"),
        Entry(argument="prune_granularity", options="--granularity output1"),
        Entry(
            argument="threshold", options="--threshold 0.01", remark="the published one of the first mask by default"
        ),
        Entry(argument="retain_reconstruction", options="--retain"),
        Entry(argument="torch_dtype", options="--dtype f16", remark="or `bf16`; the model's own by default"),
        Entry(argument="save_ppl", options="--tasks wikitext,ptb", remark="in the run's `evaluation-torch.json`"),
        Entry(argument="save_zeroshot", options="--tasks hellaswag,winogrande,arc_easy", remark="in the same file"),
        Entry(argument="save_model", options="--out runs/barber", remark="its `checkpoint/`"),
        Entry(argument="delete", options="--delete-model"),
        Entry(
            argument="datasets_cache_dir", options="--data-dir data", remark="files; the hub's own cache is `$HF_HOME`"
        ),
        _CACHE,
    ),
)
NN_PRUNING = Seed(
    name="nn-pruning",
    command="dilap-prune --pattern 0.5 --method sparsegpt --calib c4 --propagate dense",
    entries=(
        Entry(argument="prune_model", name="dilap.sparsity.rules:sparsify_"),
        Entry(argument="sparsity", options="--pattern 2:4"),
        Entry(argument="calib_dataloader", options="--calib-sequences 128 --calib-length 2048"),
        Entry(argument="pbar", name="dilap.core.progress:Progress"),
        Entry(argument="BaseUnstructuredPruner", name="dilap.sparsity.pruner:Pruner"),
        Entry(argument="add_linear_activations", name="dilap.sparsity.pruner:Pruner.add_inputs"),
        Entry(argument="clear_linear_activations", remark="a matrix is asked for once, after all its inputs"),
        Entry(argument="prune_linear_unstruct", name="dilap.sparsity.pruner:Pruner.unstructured"),
        Entry(argument="prune_linear_nm", name="dilap.sparsity.pruner:Pruner.n_of_m"),
        Entry(argument="verify_unstructured_sparsity", name="dilap.sparsity.pattern:Pattern.require"),
        Entry(argument="OptModelForwarder", name="dilap.models.statistics:layer_statistics"),
        Entry(argument="dampening, block_size", options="--set dampening=0.01 --set blocksize=128"),
        Entry(argument="the table of OPT", name="tools/opt_table"),
    ),
)
SPRINT = Seed(
    name="SPRINT",
    command="dilap-prune --target host_cpu --budget 1.4x --method sprint --calib wikitext2",
    entries=(
        Entry(argument="model_name", options="--model ./my-llama"),
        Entry(argument="dataset", options="--calib wikitext2"),
        _NSAMPLES,
        _SEED,
        Entry(argument="target_speedup", options="--budget 1.61x", remark="measured, where theirs is predicted"),
        Entry(argument="num_remove_sublayers", options="--set num_remove=14"),
        Entry(argument="latency_aware", options="--set latency_aware=false"),
        Entry(argument="metrics", options="--set metrics=l1_sentence,cos_token", remark="their `l2` is `l1`"),
        Entry(argument="tuning_sublayer", options="--set tuned=ffn", remark="or `attention`, `next`, `none`"),
        Entry(argument="in_comp_tuning", options="--set tune=false"),
        Entry(argument="update_tuned_weights", options="--set update_tuned=false"),
        Entry(argument="in_comp_tuning_dtype", options="--set fit_in=f64"),
        Entry(argument="direction", options="--set direction=in_channel"),
        Entry(argument="in_comp_tuning_ratio", options="--set ratio=0.75"),
        Entry(argument="damping_coefficient", options="--set ridge=0.01", remark="a ridge, which theirs is not"),
        Entry(argument="num_candidate_sublayers", options="--set candidates=5"),
        Entry(argument="num_checkpoints", options="--set checkpoints=8"),
        Entry(argument="checkpointing_on_cpu", remark="streams are always in host memory"),
        Entry(argument="num_cpu_layers", options="--set host_layers=40"),
        Entry(argument="sensi_batch_size", options="--set batch_sequences=8"),
        Entry(argument="eval_every_step", options="--set eval_steps=every"),
        Entry(argument="eval_steps", options="--set eval_steps=4,8"),
        Entry(argument="eval_speedups", options="--set eval_speedups=1.2,1.4"),
        Entry(argument="generation", options="--set latency=generation", remark="or `device`: measured on the target"),
        Entry(argument="prompt_length", options="--set prompt_tokens=1024"),
        Entry(argument="generation_length", options="--set new_tokens=512", remark="0 is a prompt alone"),
        Entry(argument="speedup_batch_size", options="--set batch=1"),
        Entry(argument="speedup_iteration", options="--set iterations=3"),
        Entry(argument="output_dir", options="--out runs/sprint", remark="result, log and checkpoint"),
        _CACHE,
    ),
)
SEEDS = (FLAP, BARBER, NN_PRUNING, SPRINT)


def markdown() -> str:
    return "\n\n".join(seed.markdown() for seed in SEEDS)


def main(words: Sequence[str] | None = None) -> int:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args(words)
    show(markdown())
    return 0


if __name__ == "__main__":
    run(main)
