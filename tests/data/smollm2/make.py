"""Makes reference.npz: what transformers says of SmolLM2-135M-Instruct.

Needs torch, transformers, accelerate and gguf, none of which the tests need:

    python tests/data/smollm2/make.py

transformers dequantises the same GGUF file and runs it in float32 on a CPU, each
prompt alone. Kept are the prompt's token ids, 64 greedy tokens whatever they are, and
every LOGIT_STEP-th logit behind each of them. Made with transformers 5.23.0 and torch
2.13.0.
"""

import pathlib
from typing import Any

import numpy as np

PROMPTS = (
    "Water boils at",
    "def fibonacci(n):\n",
    "Once upon a time, in a small village by the sea,",
)
TOKENS, LOGIT_STEP = 64, 1024


def reference(step: int) -> dict[str, np.ndarray]:
    """Returns prompt_i, tokens_i and logits_i [64, V/step] of every prompt i."""
    import torch  # pyright: ignore[reportMissingImports]
    import transformers  # pyright: ignore[reportMissingImports]

    from jaxllm.weights import smollm2_path

    path = smollm2_path()
    place = {"pretrained_model_name_or_path": path.parent, "gguf_file": path.name}
    tokenizer = transformers.AutoTokenizer.from_pretrained(**place)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        **place, dtype=torch.float32
    ).eval()
    arrays = {}
    for i, prompt in enumerate(PROMPTS):
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        with torch.no_grad():
            whole = model.generate(
                ids,
                max_new_tokens=TOKENS,
                do_sample=False,
                eos_token_id=None,
                pad_token_id=0,
            )
            logits = model(whole).logits[0, ids.shape[1] - 1 : -1, ::step]
        arrays[f"prompt_{i}"] = ids[0].numpy().astype(np.int32)
        arrays[f"tokens_{i}"] = whole[0, ids.shape[1] :].numpy().astype(np.int32)
        arrays[f"logits_{i}"] = logits.numpy().astype(np.float32)
    return arrays


if __name__ == "__main__":
    arrays: dict[str, Any] = reference(LOGIT_STEP)
    np.savez_compressed(pathlib.Path(__file__).with_name("reference.npz"), **arrays)
