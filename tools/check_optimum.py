"""Generate with optimum's ORTModelForCausalLM from an exported folder, and compare with ONNX Runtime alone.

    python tools/check_optimum.py runs/quickstart/artifact

It needs optimum-onnx 0.1.0, which needs transformers 4.57: an environment of its own, without DiLAP. Neither side uses
DiLAP's code but `modeling_ort.py`, which lies in the folder. Exits with 1 where the tokens differ.
"""

import runpy
import sys
from pathlib import Path

import numpy as np
import onnxruntime
import torch
from transformers import AutoTokenizer

PROMPT, NUM_TOKENS = "The capital of France is", 20


def greedy(path: Path, tokens: list[int], *, num_tokens: int) -> list[int]:
    """Return `tokens` and those that follow, the likeliest every time, computed without a cache."""
    session = onnxruntime.InferenceSession(path)
    kinds = {"tensor(float)": np.float32, "tensor(float16)": np.float16}
    cache = {
        one.name: np.zeros((1, one.shape[1], 0, one.shape[3]), kinds[one.type])
        for one in session.get_inputs()
        if one.name.startswith("past_key_values")
    }
    found = list(tokens)
    for _ in range(num_tokens):
        ids = np.array([found])
        (logits,) = session.run(["logits"], {"input_ids": ids, "attention_mask": np.ones_like(ids), **cache})
        found.append(int(logits[0, -1].argmax()))
    return found


def _main() -> int:
    folder = Path(sys.argv[1])
    model = runpy.run_path(str(folder / "modeling_ort.py"))["PrunedModelForCausalLM"].from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    prompt = torch.tensor([tokenizer(PROMPT)["input_ids"]])
    arguments = {"attention_mask": torch.ones_like(prompt), "max_new_tokens": NUM_TOKENS, "min_new_tokens": NUM_TOKENS}
    generated = model.generate(prompt, do_sample=False, eos_token_id=-1, pad_token_id=0, **arguments)[0].tolist()
    wanted = greedy(folder / "model.onnx", prompt[0].tolist(), num_tokens=NUM_TOKENS)
    same = generated == wanted
    print(f"optimum:      {tokenizer.decode(generated)!r}")
    print(f"ONNX Runtime: {tokenizer.decode(wanted)!r}")
    print("the same tokens" if same else "other tokens")
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(_main())
