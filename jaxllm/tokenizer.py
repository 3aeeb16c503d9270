"""Tokenizer: text to token ids and back, as the checkpoint's makers had it.

It comes from a Hugging Face folder, whose `tokenizer.json` is taken as it is, or from
the fields of a GGUF file, which name their way of splitting text only by a word; the
words known here stand in `_SPLITS`. Either way it becomes one `tokenizer.json`, which
can be stored with a checkpoint of any kind.
"""

import contextlib
import dataclasses
import functools
import os
import pathlib
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from jaxllm import chat, files, gguf_file, gguf_tokenizer
from jaxllm.gguf_tokenizer import library

# How SentencePiece writes tokens that are bytes.
_BYTE = re.compile("<0x[0-9A-F]{2}>")

# The tokenizer.json of Llama 3, 128,256 tokens, has 17 MB.
_LIMIT_BYTES = 64 << 20


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tokenizer:
    """Text to token ids and back.

    Attributes:
      rules: the text of a `tokenizer.json`.
      eos: ids that end a text or a turn; may be empty.
      names: texts of special tokens, such as `bos_token`, for the chat template.
      chat_template: in Jinja, or None.
      context_len: tokens that the model was made for, or None where it is not said.

    Raises:
      ValueError: `rules` cannot be read.
      ModuleNotFoundError: the package `tokenizers` is not installed.
    """

    rules: str
    eos: frozenset[int]
    names: Mapping[str, str]
    chat_template: str | None = None
    context_len: int | None = None

    def __post_init__(self) -> None:
        _ = self._backend

    @functools.cached_property
    def _backend(self) -> Any:
        made = library()
        with _failing("read tokenizer.json"):
            backend = made.Tokenizer.from_str(self.rules)
            # Left over from training; transformers undoes them, too.
            backend.no_truncation()
            backend.no_padding()
        return backend

    @property
    def num_tokens(self) -> int:
        """Tokens, special ones included."""
        return self._backend.get_vocab_size()

    def encode(self, text: str, special: bool = True) -> list[int]:
        """Returns the tokens of `text`.

        Special tokens that are written out in `text` are recognised either way.

        Args:
          text: anything that UTF-8 can encode.
          special: also put what the model wants around a text, such as its first token.

        Raises:
          ValueError: the rules know nothing to do with `text`.
        """
        with _failing("make tokens of a text"):
            return self._backend.encode(text, add_special_tokens=special).ids

    def decode(self, tokens: Sequence[int], special: bool = False) -> str:
        """Returns the text of `tokens`; `special` writes special ones out."""
        with _failing("make a text of tokens"):
            return self._backend.decode(tokens, skip_special_tokens=not special)

    def find(self, text: str) -> int | None:
        """Returns the token that is `text` as a whole, or None."""
        return self._backend.token_to_id(text)

    @functools.cached_property
    def _special(self) -> frozenset[int]:
        added = self._backend.get_added_tokens_decoder()
        return frozenset(token for token, how in added.items() if how.special)

    def is_silent(self, token: int) -> bool:
        """Whether `decode` passes over `token`: a special one, or none at all."""
        return token in self._special or self._backend.id_to_token(token) is None

    def is_byte(self, token: int) -> bool:
        """Whether `token` is one byte, of a character that has no token of its own."""
        return _BYTE.fullmatch(self._backend.id_to_token(token) or "") is not None

    def stream(self) -> "Stream":
        """Returns what turns tokens into text one by one."""
        return Stream(self)

    def chat(self, *conversations: Sequence[Mapping[str, str]]) -> list[str]:
        """Returns what the model reads of conversations, up to where it answers.

        The result holds all special tokens; encode it with `special=False`.

        Args:
          *conversations: messages with `role` ("system", "user", "assistant") and
            `content`.

        Raises:
          ValueError: there is no chat template, or it fails (`jaxllm.chat.render`).
        """
        if self.chat_template is None:
            raise ValueError(
                "a chat was asked of a checkpoint without a chat template. Models that"
                " were not trained to chat have none. Give plain prompts with --nochat,"
                " or a checkpoint made to follow instructions."
            )
        return chat.render(self.chat_template, conversations, self.names)

    def to_json(self) -> dict[str, Any]:
        """Returns the tokenizer as what JSON can hold."""
        return {**dataclasses.asdict(self), "eos": sorted(self.eos)}

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> "Tokenizer":
        """Returns the tokenizer that `to_json` wrote.

        Raises:
          ValueError: `fields` are not of that form.
        """
        known = {field.name: field for field in dataclasses.fields(cls)}
        wrong = [
            name
            for name in known.keys() | fields.keys()
            if name not in fields or name not in known
        ]
        if wrong:
            raise ValueError(
                f"cannot read a tokenizer from fields {sorted(fields)}: {sorted(wrong)}"
                f" are missing or unknown. It has {sorted(known)}. Convert the"
                " checkpoint again."
            )
        return cls(**{**fields, "eos": frozenset(fields["eos"])})


@contextlib.contextmanager
def _failing(doing: str) -> Iterator[None]:
    """Makes a ValueError of whatever the library raises meanwhile.

    It has no class of its own for its errors; where its authors expected none, it
    panics, which is no `Exception`.
    """
    try:
        yield
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:
        raise ValueError(
            f"cannot {doing}: {str(error)[:400]}. The rules are those of"
            " tokenizer.json, as the Hugging Face package tokenizers writes it. Give a"
            " whole one, of this model."
        ) from error


class Stream:
    """Text of tokens that come one by one; never half a character.

    What `push` and `end` return, joined, is what `Tokenizer.decode` returns of all
    tokens. Held back are characters whose bytes are not all there, and bytes written
    as tokens of their own, which stand for characters only together.
    """

    # Enough before the newest token that it decodes as it would after all of them.
    _CONTEXT = 4

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._window: list[int] = []
        self._said = ""  # of the window's text

    def push(self, token: int) -> str:
        """Returns the text that is certain with one more token."""
        if self._tokenizer.is_silent(token):
            return ""
        self._window.append(token)
        text = self._tokenizer.decode(self._window)
        sure = text.rstrip("\ufffd")  # How an unfinished character decodes.
        if self._tokenizer.is_byte(token) or not sure.startswith(self._said):
            return ""
        new = sure[len(self._said) :]
        self._said = sure
        if sure == text and len(self._window) > 4 * self._CONTEXT:
            tail = self._window[-self._CONTEXT :]
            # With no text in it the next token would seem to be the first.
            if said := self._tokenizer.decode(tail):
                self._window, self._said = tail, said
        return new

    def end(self) -> str:
        """Returns the rest, when no token will follow."""
        rest = self._tokenizer.decode(self._window)[len(self._said) :]
        self._said += rest
        return rest


def tokenizer_of(path: str | pathlib.Path) -> Tokenizer:
    """Returns the tokenizer in a Hugging Face folder or a GGUF file.

    Args:
      path: a folder with `tokenizer.json`, beside which `tokenizer_config.json`,
        `chat_template.jinja`, `generation_config.json` and `config.json` are read
        where they are there; or a `.gguf` file.

    Raises:
      ValueError: no tokenizer is there, or it is of a kind that is not read here.
      ModuleNotFoundError: the package `tokenizers` or `gguf` is not installed.
    """
    path = pathlib.Path(path)
    if path.is_dir():
        return _of_folder(path)
    header = gguf_file.read_header(files.find(path), arrays=True)
    return Tokenizer(**gguf_tokenizer.attributes(header.fields))


def _of_folder(folder: pathlib.Path) -> Tokenizer:
    rules = _read(folder, "tokenizer.json")
    if rules is None:
        raise ValueError(
            f"{folder} has no tokenizer.json. A tokenizer.model alone is not read here:"
            " it does not say all. Write a tokenizer.json with save_pretrained of"
            " transformers.AutoTokenizer."
        )
    settings = _fields(folder, "tokenizer_config.json")
    model = _fields(folder, "config.json")
    names = {
        name: text
        for name, value in settings.items()
        if name.endswith("_token") and (text := _text(value)) is not None
    }
    # The first that says it: what to stop at, what the model has, the tokenizer's own.
    said = _fields(folder, "generation_config.json").get("eos_token_id")
    said = model.get("eos_token_id") if said is None else said
    tokenizer = Tokenizer(
        rules=rules,
        eos=frozenset(() if said is None else _ids(said, folder)),
        names=names,
        chat_template=_read(folder, "chat_template.jinja")
        or _default(settings.get("chat_template")),
        context_len=_length(model.get("max_position_embeddings"), folder),
    )
    if said is None and (end := tokenizer.find(names.get("eos_token", ""))) is not None:
        return dataclasses.replace(tokenizer, eos=frozenset([end]))
    return tokenizer


def _read(folder: pathlib.Path, name: str) -> str | None:
    """Returns the text of a file of `folder`; None if it is not there."""
    if not os.path.lexists(folder / name):
        return None
    file = files.member(folder, name)
    if file.size_bytes > _LIMIT_BYTES:
        raise ValueError(
            f"cannot read {file.path}: it has {file.size_bytes} bytes. What belongs to"
            f" a tokenizer has at most {_LIMIT_BYTES}. Give the right file."
        )
    try:
        return file.read(0, file.size_bytes).decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"cannot read {file.path}: {error}. It is text in UTF-8. Download it anew."
        ) from error


def _fields(folder: pathlib.Path, name: str) -> dict[str, Any]:
    """Returns the fields of a JSON file of `folder`; none if it is not there."""
    if not os.path.lexists(folder / name):
        return {}
    return files.read_json(files.member(folder, name))


def _text(value: Any) -> str | None:
    """Returns the text of a special token, which may come with its settings."""
    if isinstance(value, Mapping):
        value = value.get("content")
    return value if isinstance(value, str) else None


def _ids(value: Any, where: Any) -> Sequence[int]:
    ids = value if isinstance(value, list | tuple) else [value]
    if any(type(token) is not int or token < 0 for token in ids):
        raise ValueError(
            f"{where} has eos_token_id {value!r}; it is a token or a list of tokens."
            " Correct the file."
        )
    return ids


def _length(value: Any, where: Any) -> int | None:
    if value is not None and (type(value) is not int or value < 1):
        raise ValueError(
            f"{where} has a context of {value!r} tokens; it is a positive whole number."
            " Correct the file."
        )
    return value


def _default(value: Any) -> str | None:
    """Returns the chat template, or the default one of several."""
    if isinstance(value, list):
        named = {t.get("name"): t for t in value if isinstance(t, Mapping)}
        value = named.get("default", {}).get("template")
    return value if isinstance(value, str) else None
