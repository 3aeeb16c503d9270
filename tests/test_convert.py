"""What is converted is what the files hold, text included; the rest is refused."""

import dataclasses
import pathlib
import shlex
import subprocess
import sys
from typing import Any

import jax
import numpy as np
import pytest

from experiments import convert, trained
from jaxllm.tokenizer import tokenizer_of
from jaxllm.weights import open_checkpoint
from sharding import checkpoint, published
from sharding.layout import Layout
from sharding.mesh import make_mesh
from sharding.partition import Partition, Workload
from sharding.target import parse_target
from tests import checkpoints, tiny_text

gguf = pytest.importorskip("gguf")
ROOT = pathlib.Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return tiny_text.write_model(tmp_path_factory.mktemp("model"))


def converted(**asked: Any) -> tuple[checkpoint.Saved, list[tuple[str, int]]]:
    """Returns what was written, and what was told meanwhile."""
    plan, wrong = convert.plan(**{"target": "cpu:8", **asked})
    assert plan, wrong
    told: list[tuple[str, int]] = []
    saved = convert.convert(plan, lambda *what: told.append(what))
    assert told[-1] == ("Writing", plan.num_bytes)
    return saved, told


def assert_holds(saved: checkpoint.Saved, files: Any, partition: str) -> None:
    """Holds every array of a checkpoint against the files it came from."""
    layout = Layout(
        config=saved.config,
        partition=Partition.parse(partition),
        workload=Workload(batch_size=8, input_len=1, output_len=1),
        dtype=saved.dtype,
    )
    target = parse_target(f"cpu:{layout.partition.num_devices}")
    mesh = make_mesh(target.mesh_devices(layout.partition.shape))
    params = checkpoint.restore_params(saved.path, layout, mesh)
    original = open_checkpoint(files)
    for part, tree in published.disassemble(layout, mesh, params):
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
            keys = tuple(key.key for key in path)
            whole = tuple(slice(None) for _ in leaf.shape)
            expected = original.read(part, keys, whole, leaf.dtype)
            np.testing.assert_array_equal(np.asarray(leaf), expected)


def test_a_folder_becomes_a_checkpoint_with_its_text(
    folder: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    out = tmp_path / "deep" / "out"
    saved, told = converted(checkpoint=str(folder), out=str(out), partition="tp4_pp2")
    assert saved.path == out
    assert saved.dtype == "float32"
    assert_holds(saved, folder, "dp2_tp2")
    parts = saved.config.num_layers + 1
    assert told[parts - 1] == (f"Read part {parts} of {parts}", told[-1][1])
    found = trained.find(checkpoint=str(out))
    assert found.tokenizer == tokenizer_of(folder)
    assert found.tokenizer.chat_template == tiny_text.TEMPLATE


def test_a_gguf_file_too_and_nothing_is_lost(tmp_path: pathlib.Path) -> None:
    model = dataclasses.replace(tiny_text.MODEL, rope_scaling=None)
    tensors = checkpoints.hugging_face(checkpoints.random_params(model), model)
    file = checkpoints.write_gguf(
        tmp_path / "model.gguf",
        model,
        checkpoints.gguf_tensors(tensors, model),
        gguf.GGMLQuantizationType.F16,
        fields=tiny_text.gguf_fields(),
    )
    saved, _ = converted(checkpoint=str(file), out=str(tmp_path / "a"))
    assert saved.dtype == "float32"  # norms are stored so, beside float16
    assert_holds(saved, file, "tp2")
    saved, _ = converted(
        checkpoint=str(file), out=str(tmp_path / "a"), dtype="bfloat16", overwrite=True
    )
    assert saved.dtype == "bfloat16"
    assert_holds(saved, file, "tp1")


def _asks(folder: pathlib.Path, at: pathlib.Path) -> dict[str, tuple[dict, str]]:
    """Returns what is asked for, and what the answer says."""
    no_text = at / "no_text"
    params = checkpoints.random_params(tiny_text.MODEL)
    checkpoints.write_folder(
        no_text,
        checkpoints.config_json(tiny_text.MODEL),
        checkpoints.hugging_face(params, tiny_text.MODEL),
    )
    (at / "mine").mkdir()
    (at / "mine" / "thesis.tex").touch()
    (at / "converted").mkdir()
    (at / "converted" / "jaxllm.json").touch()
    (at / "file").touch()
    good = {"checkpoint": str(folder), "out": str(at / "out")}
    return {
        "neither": (
            {**good, "checkpoint": None},
            "--model=None and --checkpoint=None.",
        ),
        "both": ({**good, "model": "smollm2-135m"}, "Exactly one of them"),
        "preset": ({"out": good["out"], "model": "llama-3.1-8b"}, "has no weights"),
        "no out": ({"checkpoint": str(folder)}, "there is no --out"),
        "missing": ({**good, "checkpoint": str(at / "no")}, "no"),
        "no text": ({**good, "checkpoint": str(no_text)}, "tokenizer.json"),
        "done": ({**good, "checkpoint": str(at / "converted")}, "converted already"),
        "partition": ({**good, "partition": "tq2"}, "cannot read 'tq2'"),
        "devices": ({**good, "partition": "tp16", "target": "cpu:8"}, "needs 16"),
        "described": ({**good, "target": "h100:8"}, "compiled for and never run"),
        "taken": ({**good, "out": str(at / "mine")}, "something else is there"),
        "again": ({**good, "out": str(at / "converted")}, "is there already"),
        "in file": ({**good, "out": str(at / "file" / "out")}, "not a folder"),
    }


def test_bad_input_is_refused_before_anything_is_read(
    folder: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    for asked, says in _asks(folder, tmp_path).values():
        plan, wrong = convert.plan(**{"out": None, **asked})
        assert plan is None
        (answer,) = wrong
        assert says in answer
    assert not (tmp_path / "out").exists()


def test_everything_wrong_is_said_at_once() -> None:
    _, wrong = convert.plan(out=None, checkpoint="/no", partition="x")
    assert len(wrong) == 3


def _command(*flags: str) -> list[str]:
    return [sys.executable, "-m", "experiments.convert", *flags]


def test_prints_the_command_that_uses_it(
    folder: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    out = tmp_path / "it's here"
    flags = (f"--checkpoint={folder}", f"--out={out}", "--target=cpu:2")
    done = subprocess.run(_command(*flags), cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    saved = checkpoint.open_saved(out)
    *_, command = done.stdout.strip().splitlines()
    assert f"--checkpoint={out}" in shlex.split(command)
    assert "a tokenizer of 264 tokens and a chat template" in done.stdout
    assert f"{saved.num_bytes / 1e3:.0f} kB" in done.stdout
    assert "Array name" not in done.stderr  # what Orbax would tell

    again = subprocess.run(_command(*flags), cwd=ROOT, capture_output=True, text=True)
    assert again.returncode == 1
    assert "Nothing was started. 1 to put right" in again.stderr
    assert "a checkpoint is there already" in again.stderr
    assert "Traceback" not in again.stderr
