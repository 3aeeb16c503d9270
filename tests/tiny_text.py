"""A tokenizer of 264 tokens and a random model of as many, for tests about text."""

import dataclasses
import json
import pathlib
from typing import Any

import pytest

from jaxllm.config import TINY
from jaxllm.tokenizer import Tokenizer
from tests import checkpoints

tokenizers = pytest.importorskip("tokenizers")

BYTES = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
MERGES = [("h", "e"), ("l", "l"), ("he", "ll"), ("Ġ", "w"), ("1", "2")]
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TOKENS = [*SPECIAL, *BYTES, *map("".join, MERGES)]

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

# Three layers, so that two stages hold different numbers of them.
MODEL = dataclasses.replace(TINY, num_layers=3, vocab_size=len(TOKENS))


def gguf_fields(**more: Any) -> dict[str, Any]:
    """Returns the fields of a GGUF file with these tokens; `more` of tokenizer.ggml."""
    fields = {
        "model": "gpt2",
        "pre": "gpt-2",
        "tokens": TOKENS,
        "token_type": [3] * len(SPECIAL) + [1] * (len(TOKENS) - len(SPECIAL)),
        "merges": [" ".join(pair) for pair in MERGES],
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    named = {f"tokenizer.ggml.{name}": value for name, value in (fields | more).items()}
    return {"general.architecture": "llama", "llama.context_length": 96, **named}


def library_tokenizer() -> Any:
    """Returns the tokenizer as the library makes it."""
    vocab = {text: i for i, text in enumerate(TOKENS)}
    made = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocab, merges=MERGES))
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    made.add_special_tokens(SPECIAL)
    return made


def tokenizer(**more: Any) -> Tokenizer:
    """Returns the tokenizer as ours."""
    fields = dict(eos=frozenset({2}), names={}, chat_template=TEMPLATE, context_len=96)
    return Tokenizer(rules=library_tokenizer().to_str(), **{**fields, **more})


def write_text_files(folder: pathlib.Path, **files: Any) -> pathlib.Path:
    """Writes the text half of a Hugging Face folder; None leaves a file out."""
    folder.mkdir(parents=True, exist_ok=True)
    content = {
        "tokenizer.json": json.loads(library_tokenizer().to_str()),
        "tokenizer_config.json": {
            "bos_token": "<|im_start|>",
            "eos_token": {"content": "<|im_end|>", "lstrip": False},
            "chat_template": TEMPLATE,
        },
        "config.json": {"max_position_embeddings": 96},
    }
    content |= {name.replace("__", "."): value for name, value in files.items()}
    for name, value in content.items():
        if value is not None:
            text = value if isinstance(value, str) else json.dumps(value)
            (folder / name).write_text(text)
    return folder


def write_model(folder: pathlib.Path) -> pathlib.Path:
    """Writes a whole Hugging Face folder of the random model."""
    params = checkpoints.random_params(MODEL, seed=3)
    tensors = checkpoints.hugging_face(params, MODEL)
    # Scores far enough apart that another order of sums picks the same tokens.
    tensors["lm_head.weight"] *= 8
    fields = {**checkpoints.config_json(MODEL), "max_position_embeddings": 96}
    checkpoints.write_folder(folder, fields, tensors)
    return write_text_files(folder, config__json=None)
