"""What text is asked for: made ready to generate, or refused before anything long."""

import dataclasses
from collections.abc import Callable
from typing import Any

from experiments import trained
from experiments.generation import Generator, Prompt
from experiments.trained import Trained
from jaxllm.decode import Sampling
from sharding.partition import Partition

_LARGEST_BATCH = 64  # unless another size is asked for

# The least number, and the first that is too large.
_LIMITS = {"max_new_tokens": (1, 2**31), "seed": (0, 2**32), "batch_size": (1, 2**31)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ask:
    """What text is asked for, as on the command line."""

    prompts: tuple[str, ...]
    model: str | None = None
    checkpoint: str | None = None
    partition: str = "tp1"
    rules: str = "megatron"
    target: str = "auto"
    dtype: str = "auto"
    weights: str | None = None
    kv: str | None = None
    layers: str = "auto"
    max_new_tokens: int = 64
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    batch_size: int | None = None
    chat: bool = False
    system: str | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """What will be done.

    Attributes:
      generator: nothing of it is compiled or loaded yet.
      prompts: as tokens.
    """

    generator: Generator
    prompts: tuple[Prompt, ...]


def plan(ask: Ask) -> tuple[Plan | None, list[str]]:
    """Returns what to do about `ask`, or else everything wrong with it.

    Reads headers and starts JAX.
    """
    wrong: list[str] = []

    def tried(function: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
        try:
            return function(*arguments, **named)
        except (ValueError, ModuleNotFoundError) as error:
            wrong.append(str(error))
            return None

    how = {name: getattr(ask, name) for name in ("temperature", "top_k", "top_p")}
    for name, value in how.items():
        tried(Sampling, **{name: value})
    partition = tried(Partition.parse, ask.partition, ask.rules)
    model = tried(trained.find, ask.model, ask.checkpoint)
    for name in _LIMITS:
        tried(_check_number, name, getattr(ask, name))
    tried(_check_texts, ask)
    if wrong:
        return None, wrong
    prompts = tried(_prompts, ask, model)
    for prompt in prompts or ():
        tried(_check_length, prompt, ask.max_new_tokens, model)
    target = tried(trained.find_target, ask.target, partition.num_devices)
    if target is None or wrong:
        return None, wrong
    on_cpu = target.platform == "cpu"
    stored: dict[str, Any] = dict(weights=ask.weights, kv=ask.kv)
    generator = tried(
        Generator,
        model,
        partition,
        target,
        dtype=("float32" if on_cpu else "bfloat16")
        if ask.dtype == "auto"
        else ask.dtype,
        **stored,
        layers=ask.layers,
        max_new_tokens=ask.max_new_tokens,
        sampling=Sampling(**how),
        batch_size=ask.batch_size or min(len(prompts), _LARGEST_BATCH),
    )
    if wrong:
        return None, wrong
    return Plan(generator=generator, prompts=tuple(prompts)), []


def _check_number(name: str, value: int | None) -> None:
    least, limit = _LIMITS[name]
    if value is not None and not least <= value < limit:
        raise ValueError(
            f"{name}={value} is out of range: it is at least {least} and below"
            f" {limit}. Choose such a number."
        )


def _check_texts(ask: Ask) -> None:
    if not ask.prompts:
        raise ValueError(
            "there is no prompt. The model goes on from a text. Give one with --prompt,"
            " or a file with one a line with --prompts_file."
        )
    if ask.system is not None and not ask.chat:
        raise ValueError(
            "a system message was given without a chat. Plain prompts have no messages."
            " Add --chat, or leave --system out."
        )
    for i, prompt in enumerate(ask.prompts, start=1):
        if not prompt:
            raise ValueError(
                f"prompt {i} of {len(ask.prompts)} is empty. The model goes on from a"
                " text of at least one token. Write one."
            )
        try:
            f"{prompt}{ask.system}".encode()
        except UnicodeEncodeError as error:
            raise ValueError(
                f"prompt {i} of {len(ask.prompts)} is no text: {error}. Prompts are"
                " UTF-8. Write it so."
            ) from error


def _prompts(ask: Ask, model: Trained) -> list[Prompt]:
    tokenizer, texts = model.tokenizer, list(ask.prompts)
    if ask.chat:
        first = [{"role": "system", "content": ask.system}] if ask.system else []
        texts = tokenizer.chat(
            *([*first, {"role": "user", "content": text}] for text in texts)
        )
    return [
        Prompt(text=prompt, tokens=tuple(tokenizer.encode(text, special=not ask.chat)))
        for prompt, text in zip(ask.prompts, texts, strict=True)
    ]


def _check_length(prompt: Prompt, max_new_tokens: int, model: Trained) -> None:
    count, most = len(prompt.tokens), model.tokenizer.context_len
    begin = prompt.text if len(prompt.text) < 40 else f"{prompt.text[:40]}..."
    if most is not None and count + max_new_tokens > most:
        raise ValueError(
            f"prompt {begin!r} has {count} tokens and asks for {max_new_tokens} more:"
            f" {count + max_new_tokens} together. {model.name} was made for {most}."
            " Shorten the prompt or ask for less."
        )
    vocabulary = model.config.vocab_size
    if not count or max(prompt.tokens) >= vocabulary:
        raise ValueError(
            f"prompt {begin!r} becomes tokens {list(prompt.tokens[:8])}. The model"
            f" needs at least one, and knows those below {vocabulary}. Write another"
            " prompt, or take the tokenizer of this model."
        )
