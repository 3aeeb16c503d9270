"""Each prompt goes on as it does alone, whatever is beside it and wherever it runs."""

import dataclasses
import io
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator

import numpy as np
import pytest
from rich.console import Console

from experiments import generation, prompting, trained
from experiments.generation import Completion, Generator, Prompt
from experiments.prompting import Ask
from experiments.report import writing
from jaxllm.decode import GREEDY, Sampling
from sharding.partition import Partition, Workload, check
from sharding.program import Program
from tests import tiny_text
from tests.tiny_text import MODEL

ROOT = pathlib.Path(__file__).resolve().parent.parent
DRAWN = Sampling(temperature=0.9, top_k=40, top_p=0.95)
# Of 11, 1, 19 and 5 tokens; two fit the shortest programs, one does not.
TEXTS = ("hello world", "x", "what does it say, 12", "é 日")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return tiny_text.write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def ask(folder: pathlib.Path) -> Ask:
    return Ask(
        checkpoint=str(folder), prompts=TEXTS, max_new_tokens=12, target="cpu:8", seed=5
    )


def planned(ask: Ask) -> prompting.Plan:
    plan, wrong = prompting.plan(ask)
    assert not wrong
    assert plan
    return plan


def completions(ask: Ask) -> list[Completion]:
    plan = planned(ask)
    return generation.generate_texts(plan.generator, plan.prompts, ask.seed)


def sampled(ask: Ask, sampling: Sampling) -> Ask:
    return dataclasses.replace(ask, **dataclasses.asdict(sampling))


Alone = dict[Sampling, tuple[prompting.Plan, list[Completion]]]


@pytest.fixture(scope="module")
def alone(ask: Ask) -> Alone:
    """How each prompt goes on by itself, on one device."""
    one = dataclasses.replace(ask, batch_size=1)
    plans = {s: planned(sampled(one, s)) for s in (GREEDY, DRAWN)}
    return {
        s: (plan, generation.generate_texts(plan.generator, plan.prompts, ask.seed))
        for s, plan in plans.items()
    }


def test_random_models_say_something(alone: Alone) -> None:
    """Else the other tests would hold for any program."""
    rows = [c.tokens for _, said in alone.values() for c in said]
    assert len(set(rows)) > len(TEXTS)
    assert sum(len(set(row)) > 4 for row in rows) > len(TEXTS)


@pytest.mark.parametrize(
    ("name", "sampling"),
    [
        ("tp4", GREEDY),
        ("pp2", GREEDY),
        ("dp2_tp2", DRAWN),
        ("tp2_pp3", DRAWN),
    ],
)
def test_a_prompt_goes_on_as_it_does_alone(
    name: str, sampling: Sampling, ask: Ask, alone: Alone
) -> None:
    together = dataclasses.replace(sampled(ask, sampling), partition=name)
    assert completions(together) == alone[sampling][1]


def test_layers_are_written_either_way(ask: Ask, alone: Alone) -> None:
    unrolled = dataclasses.replace(ask, layers="unrolled")
    assert completions(unrolled) == alone[GREEDY][1]


def test_programs_are_compiled_once_for_each_length(
    alone: Alone, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan, said = alone[GREEDY]
    generator = plan.generator
    assert set(generator._compiled) == {16, 32}
    monkeypatch.delattr(Program, "compile")
    assert generation.generate_texts(generator, plan.prompts) == [
        dataclasses.replace(c, seed=0) for c in said
    ]
    with pytest.raises(ValueError, match="2 prompts for a batch of 1"):
        generator.start(plan.prompts[:2])


@pytest.fixture(scope="module")
def greedy(ask: Ask) -> tuple[Generator, list[Prompt]]:
    plan = planned(ask)
    return plan.generator, list(plan.prompts)


@pytest.fixture
def with_ends(greedy: tuple[Generator, list[Prompt]]) -> Iterator:
    """Returns a function that lets the model end at other tokens."""
    generator = greedy[0]
    model = generator.model

    def change(eos: set[int]) -> Generator:
        tokenizer = dataclasses.replace(model.tokenizer, eos=frozenset(eos))
        generator.model = dataclasses.replace(model, tokenizer=tokenizer)
        return generator

    yield change
    generator.model = model


def test_a_text_ends_where_the_model_ends_it(greedy, with_ends) -> None:
    prompts = greedy[1]
    whole = generation.generate_texts(with_ends(set()), prompts)
    assert {c.finish_reason for c in whole} == {"length"}
    end = whole[0].tokens[3]
    for before, after in zip(
        whole, generation.generate_texts(with_ends({end}), prompts), strict=True
    ):
        if end not in before.tokens:
            assert after == before
            continue
        at = before.tokens.index(end)
        assert after.finish_reason == "eos"
        assert after.tokens == before.tokens[: at + 1]
        assert after.text == greedy[0].model.tokenizer.decode(before.tokens[:at])


def test_it_stops_when_every_text_ended(greedy, with_ends) -> None:
    prompts = greedy[1]
    ends = {c.tokens[1] for c in generation.generate_texts(with_ends(set()), prompts)}
    batch = with_ends(ends).start(prompts)
    assert len(list(batch)) <= 2
    assert {c.finish_reason for c in batch.completions} == {"eos"}


def test_pieces_are_the_text(
    greedy: tuple[Generator, list[Prompt]], alone: Alone
) -> None:
    generator, prompts = greedy
    batch = generator.start(prompts, seed=5)
    joined = ["".join(pieces) for pieces in zip(*batch, strict=True)]
    assert joined == [c.text for c in batch.completions]
    assert batch.completions == alone[GREEDY][1]
    decode = generator.model.tokenizer.decode
    for c in batch.completions:
        ended = c.finish_reason == "eos"
        assert c.text == decode(c.tokens[:-1] if ended else c.tokens)
    timing = batch.timing
    assert timing
    assert 0 < timing.ttft_s <= timing.e2e_s
    assert timing.num_tokens == sum(len(c.tokens) for c in batch.completions)


def test_interrupted_it_keeps_what_it_has(greedy) -> None:
    generator, prompts = greedy
    batch = generator.start(prompts)
    assert batch.timing is None
    steps = iter(batch)
    said = [next(steps) for _ in range(3)] + [batch.stop()]
    cut = batch.completions
    assert {c.finish_reason for c in cut if len(c.tokens) == 3} == {"interrupted"}
    assert ["".join(pieces) for pieces in zip(*said, strict=True)] == [
        c.text for c in cut
    ]
    whole = generation.generate_texts(generator, prompts)
    assert all(c.tokens == w.tokens[:3] for c, w in zip(cut, whole, strict=True))


def test_lengths_and_batches_are_rounded_up() -> None:
    found = [generation.bucket(n) for n in (1, 16, 17, 64, 65, 1000, 1025)]
    assert found == [16, 16, 32, 64, 80, 1024, 1280]
    assert generation.bucket(20, ways=3) == 48
    for name in ("tp1", "dp2_tp2", "pp3", "dp2_pp3"):
        partition = Partition.parse(name)
        for count in range(1, 20):
            batch = generation.padded_batch(partition, count)
            assert count <= batch <= count + 5
            workload = Workload(batch_size=batch, input_len=8, output_len=4)
            check(MODEL, partition, workload)


def test_chat_is_put_around_every_prompt(ask: Ask) -> None:
    plan = planned(dataclasses.replace(ask, chat=True, system="he", prompts=("x", "y")))
    decode = plan.generator.model.tokenizer.decode
    assert decode(plan.prompts[1].tokens, special=True) == (
        "<|im_start|>system\nhe<|im_end|>\n<|im_start|>user\ny<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    assert plan.prompts[1].text == "y"


REFUSED = {
    "tp2_tp2": (dict(partition="tp2_tp2"), "cannot read 'tp2' in partition"),
    "tp3": (dict(partition="tp3"), "tp3 .* 8 query heads|8 .*over 3|heads"),
    "pp4": (dict(partition="pp4"), "4 stages for 3 layers"),
    "rules": (dict(rules="megaton"), "Did you mean megatron"),
    "cold": (dict(temperature=-0.5), "temperature=-0.5"),
    "nan": (dict(temperature=float("nan")), "temperature=nan"),
    "top_k": (dict(top_k=-1), "top_k=-1"),
    "top_p=0": (dict(top_p=0.0), "top_p=0.0"),
    "top_p>1": (dict(top_p=1.5), "top_p=1.5"),
    "none": (dict(prompts=()), "there is no prompt"),
    "empty": (dict(prompts=("x", "")), "prompt 2 of 2 is empty"),
    "no text": (dict(prompts=("\ud800",)), "prompt 1 of 1 is no text"),
    "long": (dict(prompts=("x" * 90,)), "90 tokens and asks for 12 more: 102 .* 96"),
    "much": (dict(max_new_tokens=96, prompts=("x",)), "97 together"),
    "nothing": (dict(max_new_tokens=0), "max_new_tokens=0 is out of range"),
    "seed": (dict(seed=-1), "seed=-1 is out of range: it is at least 0"),
    "batch": (dict(batch_size=0), "batch_size=0 is out of range"),
    "system": (dict(system="x"), "a system message was given without a chat"),
    "no file": (dict(checkpoint="/nowhere"), "/nowhere"),
    "long name": (dict(checkpoint="x" * 5000), "cannot open 'xxx.* too long"),
    "long model": (dict(model="x" * 5000, checkpoint=None), "unknown model 'xxx"),
    "unlike": (dict(model="tiny"), "num_layers=9.* has num_layers=3"),
    "unknown": (dict(model="smolm2", checkpoint=None), "unknown model 'smolm2'"),
    "no weights": (
        dict(model="llama-3.1-8b", checkpoint=None),
        "'llama-3.1-8b' has no weights here.*--checkpoint=PATH",
    ),
    "described": (dict(target="h100:8"), "'h100:8' is compiled for and never run"),
    "few": (dict(target="cpu:2", partition="tp4"), "needs 4 devices.* has 2"),
    "no target": (dict(target="gpu"), "no target 'gpu'"),
}


@pytest.mark.parametrize(("change", "message"), REFUSED.values(), ids=REFUSED)
def test_bad_input_is_refused_before_anything_long(
    ask: Ask, change: dict, message: str
) -> None:
    plan, wrong = prompting.plan(dataclasses.replace(ask, **change))
    assert plan is None
    assert len(wrong) == 1
    assert re.search(message, wrong[0])


def test_everything_wrong_is_said_at_once(ask: Ask) -> None:
    _, wrong = prompting.plan(
        dataclasses.replace(
            ask,
            partition="x",
            temperature=-1.0,
            top_k=-1,
            prompts=(),
            seed=-1,
            batch_size=0,
        )
    )
    assert len(wrong) == 6


def test_without_the_package_or_its_weights_it_says_how_to_get_them(
    ask: Ask, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    assert "make weights" in prompting.plan(ask)[1][0]
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    unasked = dataclasses.replace(ask, checkpoint=None)
    assert "make weights" in prompting.plan(unasked)[1][0]


def test_an_accelerator_is_taken_if_there_are_enough(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    monkeypatch.setattr(trained, "_have_accelerators", lambda: False)
    assert trained.find_target("auto", 3).name == "cpu:3"
    assert trained.find_target("cpu:8", 3).num_devices == 3


# What the command prints.


def run(*flags: str, stdin: str = "") -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "experiments.generate", *flags]
    return subprocess.run(
        command, cwd=ROOT, input=stdin, capture_output=True, text=True, timeout=120
    )


def test_json_is_all_there_is_on_stdout(folder: pathlib.Path, alone: Alone) -> None:
    done = run(
        f"--checkpoint={folder}",
        "--partition=pp2",
        "--prompts_file=-",
        f"--prompt={TEXTS[0]}",
        "--max_new_tokens=12",
        "--json",
        stdin=f"{TEXTS[2]}\n\n",
    )
    assert done.returncode == 0, done.stderr
    objects = [json.loads(line) for line in done.stdout.splitlines()]
    expected = alone[GREEDY][1][::2]
    for found, c in zip(objects, expected, strict=True):
        assert (found["prompt"], found["text"]) == (c.prompt.text, c.text)
        assert tuple(found["tokens"]) == c.tokens
        assert tuple(found["prompt_tokens"]) == c.prompt.tokens
        assert found["finish_reason"] == c.finish_reason
        assert (found["partition"], found["dtype"]) == ("pp2", "float32")
        assert found["layers"] == "scanned"  # not what was asked for, auto
    assert "tokens/s" in done.stderr.splitlines()[-1]
    assert "pp2 on 2 cpu, float32" in done.stderr.splitlines()[-1]


def test_refusals_are_listed(folder: pathlib.Path) -> None:
    done = run(f"--checkpoint={folder}", "--top_p=2", "--prompt=")
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.startswith("Nothing was started. 2 to put right:\n  - top_p=2.0")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="Linux has it")
def test_a_full_disk_is_said_in_a_line(folder: pathlib.Path) -> None:
    command = [sys.executable, "-m", "experiments.generate", "--prompt=x", "--json"]
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [*command, f"--checkpoint={folder}", "--max_new_tokens=2"],
            cwd=ROOT,
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            timeout=120,
        )
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("Stopped: [Errno 28]")


def test_what_only_loading_shows_is_said_in_a_line(
    folder: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    copy = shutil.copytree(folder, tmp_path / "model")
    with (copy / "model.safetensors").open("r+b") as file:
        file.seek(-4, os.SEEK_END)
        file.write(np.float32(1e9).tobytes())
    done = run(f"--checkpoint={copy}", "--prompt=x", "--dtype=float16")
    assert (done.returncode, done.stdout) == (1, "")
    assert re.match(r"Stopped: cannot read .* as float16: it holds 1e\+09", done.stderr)


def written(prompts: list[str], steps: list[list[str]], **terminal) -> str:
    out = io.StringIO()
    if terminal:
        console = Console(file=out, force_terminal=True, width=60, color_system=None)
        writer = (writing._Plain if len(prompts) == 1 else writing._Panels)(console)
    else:
        writer = writing.writer_for(out, len(prompts))
    with writer.batch(prompts) as write:
        for pieces in steps:
            write(pieces)
    return out.getvalue()


def test_one_prompt_is_printed_plainly() -> None:
    steps = [["He"], [""], ["llo\x1b[2J"]]
    assert written(["Say"], steps) == "Hello\x1b[2J\n"
    shown = written(["Say: "], steps, terminal=True)
    # Nothing that the model says steers the terminal.
    assert shown.endswith("Hello\ufffd[2J\n")
    assert shown.startswith("Say: ")


def test_several_prompts_are_printed_one_after_the_other() -> None:
    steps = [["a", "b"], ["c", ""]]
    assert written(["1", "2"], steps) == "> 1\nac\n\n> 2\nb\n\n"
    shown = written(["1", "2"], steps, terminal=True).splitlines()
    assert [line.strip("│ ") for line in shown if "│" in line][-2:] == ["ac", "b"]
