"""A checkpoint is whole and the model to the bit, or it is refused."""

import dataclasses
import functools
import gc
import json
import pathlib
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from jax.sharding import Mesh

from jaxllm.config import PRESETS
from jaxllm.model import Layers, Params, Tree, init_params
from sharding import checkpoint, published, seal
from sharding.layout import Layout
from sharding.mesh import make_mesh
from sharding.partition import Partition, Workload
from sharding.target import parse_target

ROOT = pathlib.Path(__file__).resolve().parent.parent
MODELS = {
    **PRESETS,
    # Hidden width and vocabulary that 6 does not divide, heads that it does.
    "tiny-odd": dataclasses.replace(
        PRESETS["tiny"], num_layers=2, num_heads=6, num_kv_heads=3, vocab_size=262
    ),
}
ONE = ("tp1", "megatron", "unrolled")
# Each restores what the one before saved.
CHAIN = [
    ("tp8", "megatron", "unrolled"),  # more devices than the 4 key/value heads
    ("tp2_pp4", "megatron", "unrolled"),  # 9 layers on 4 stages
    ONE,
    ("pp4", "megatron", "scanned"),
    ("dp2_tp2_pp2", "megatron", "scanned"),
    ("dp2_tp4", "two_d", "unrolled"),
    ("tp8", "kv_seq", "scanned"),
    ONE,
]


def place(
    model: str, partition: str, rules: str, layers: Layers, dtype: str = "float32"
) -> tuple[Layout, Mesh]:
    layout = Layout(
        config=MODELS[model],
        partition=Partition.parse(partition, rules),
        workload=Workload(batch_size=8, input_len=8, output_len=8),
        dtype=dtype,
        layers=layers,
    )
    target = parse_target(f"cpu:{layout.partition.num_devices}")
    return layout, make_mesh(target.mesh_devices(layout.partition.shape))


@functools.cache
def arrays(model: str, dtype: str = "float32", version: int = 0) -> Tree:
    """Returns the published model, every kind of number in every array."""
    rng = np.random.default_rng(version)
    kinds = [-0.0, np.inf, -np.nan, float(jnp.finfo(dtype).tiny) / 4]

    def draw(leaf: jax.ShapeDtypeStruct) -> np.ndarray:
        values = rng.standard_normal(leaf.shape, np.float32)
        values.reshape(-1)[:4] = kinds
        return values.astype(dtype)

    config = MODELS[model]
    shapes = jax.eval_shape(lambda: init_params(config, dtype))
    trees = (shapes.ends, *shapes.blocks)
    parts = zip(published.parts(config), trees, strict=True)
    return {part: jax.tree.map(draw, tree) for part, tree in parts}


def put(parts: Tree, layout: Layout, mesh: Mesh) -> Params:
    """Returns the published model as `layout` wants it."""
    wanted = published.shapes(layout, mesh)

    def lay() -> Iterator[tuple[Any, Tree]]:
        for part, tree in parts.items():
            shardings = jax.tree.map(lambda x: x.sharding, wanted[part])
            yield part, jax.device_put(tree, shardings)

    return published.assemble(layout, mesh, lay())


def bits(parts: Iterable[tuple[Any, Tree]]) -> Tree:
    """Returns arrays as integers, so that -0 is not 0 and nan is nan."""

    def integers(array: Any) -> np.ndarray:
        host = np.asarray(array)
        return host.view(f"uint{8 * host.itemsize}")

    return {str(part): jax.tree.map(integers, tree) for part, tree in parts}


def assert_same(found: Tree, expected: Tree) -> None:
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for leaf, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected)):  # noqa: B905
        assert leaf.dtype == other.dtype
        np.testing.assert_array_equal(leaf, other)


def test_a_layer_lies_as_the_stack_that_takes_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Else a part of every layer is written, and all of them gathered, for each."""
    found: list[Any] = []
    original = published._put

    def watched(layout: Layout, stack: Any, leaf: Any, **home: Any) -> jax.Array:
        jax.debug.inspect_array_sharding(leaf, callback=found.append)
        return original(layout, stack, leaf, **home)

    monkeypatch.setattr(published, "_put", watched)
    put(arrays("tiny"), *place("tiny", "dp4", "megatron", "scanned"))
    assert found
    assert all(sharding.is_fully_replicated for sharding in found)


def test_any_partition_restores_what_any_saved(tmp_path: pathlib.Path) -> None:
    expected = bits(arrays("tiny").items())
    params, before = None, None
    for number, (partition, rules, layers) in enumerate(CHAIN):
        layout, mesh = place("tiny", partition, rules, layers)
        if before is None:
            params = put(arrays("tiny"), layout, mesh)
        else:
            params = checkpoint.restore_params(before, layout, mesh)
            assert_same(bits(published.disassemble(layout, mesh, params)), expected)
            wanted = layout.shardings(layout.named_params(), mesh)
            found = jax.tree.map(lambda x: x.sharding, params)
            assert jax.tree.all(
                jax.tree.map(
                    lambda x, f, w: f.is_equivalent_to(w, x.ndim), params, found, wanted
                )
            )
        before = tmp_path / f"{number}-{partition}-{rules}"
        checkpoint.save(before, params, layout, mesh)


@pytest.mark.parametrize(
    ("model", "dtype", "saved", "restored"),
    [
        ("tiny-tied", "float32", "tp8", "tp2_pp4"),
        ("tiny-tied", "bfloat16", "tp2_pp4", "tp1"),
        ("tiny-odd", "float16", "tp6", "tp3_pp2"),
    ],
)
def test_other_models_and_dtypes(
    model: str, dtype: str, saved: str, restored: str, tmp_path: pathlib.Path
) -> None:
    layout, mesh = place(model, saved, "megatron", "unrolled", dtype)
    params = put(arrays(model, dtype), layout, mesh)
    checkpoint.save(tmp_path / "a", params, layout, mesh)
    layout, mesh = place(model, restored, "megatron", "scanned", dtype)
    params = checkpoint.restore_params(tmp_path / "a", layout, mesh)
    assert_same(
        bits(published.disassemble(layout, mesh, params)),
        bits(arrays(model, dtype).items()),
    )


def test_another_dtype_is_rounded_to(tmp_path: pathlib.Path) -> None:
    layout, mesh = place("tiny-tied", *ONE)
    params = arrays("tiny-tied")
    checkpoint.save(tmp_path / "a", put(params, layout, mesh), layout, mesh)
    layout, mesh = place("tiny-tied", "tp2", "megatron", "unrolled", "bfloat16")
    restored = checkpoint.restore_params(tmp_path / "a", layout, mesh)
    expected = {
        part: jax.tree.map(lambda x: x.astype(jnp.bfloat16), tree)
        for part, tree in params.items()
    }
    found = bits(published.disassemble(layout, mesh, restored))
    assert_same(found, bits(expected.items()))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A checkpoint that tests copy before they harm it."""
    path = tmp_path_factory.mktemp("saved") / "whole"
    layout, mesh = place("tiny-odd", "tp2", *ONE[1:])
    params = put(arrays("tiny-odd"), layout, mesh)
    checkpoint.save(path, params, layout, mesh, extra={"tokenizer": {"a": [1, "é"]}})
    return path


def restored_bits(path: pathlib.Path, model: str = "tiny-odd") -> Tree:
    layout, mesh = place(model, *ONE)
    params = checkpoint.restore_params(path, layout, mesh)
    return bits(published.disassemble(layout, mesh, params))


def test_what_it_holds_is_known_before_arrays_are_read(whole: pathlib.Path) -> None:
    saved = checkpoint.open_saved(str(whole))
    assert saved.config == MODELS["tiny-odd"]
    assert saved.dtype == "float32"
    assert saved.extra == {"tokenizer": {"a": [1, "é"]}}
    assert saved.num_bytes > 4 * saved.config.num_params


def test_arrays_are_split_over_all_devices_in_the_files(tmp_path: pathlib.Path) -> None:
    """Every device writes its own piece, replicas and stages too."""
    layout, mesh = place("tiny", "dp2_tp2_pp2", "megatron", "unrolled")
    params = put(arrays("tiny"), layout, mesh)
    checkpoint.save(tmp_path / "a", params, layout, mesh)
    with ocp.PyTreeCheckpointer() as reader:
        stored: Any = reader.metadata(tmp_path / "a").item_metadata
    block = stored["3"]
    assert block["attention"]["w_qkv"].shape == (48, 160)
    assert block["attention"]["w_qkv"].storage.write_shape == (12, 80)


def test_what_was_saved_may_be_donated_at_once(tmp_path: pathlib.Path) -> None:
    layout, mesh = place("tiny", "tp2_pp2", "megatron", "scanned")
    params = put(arrays("tiny"), layout, mesh)
    spoil = jax.jit(lambda p: jax.tree.map(jnp.zeros_like, p), donate_argnums=0)
    saving = checkpoint.save(tmp_path / "a", params, layout, mesh, wait=False)
    for _ in range(3):
        params = jax.block_until_ready(spoil(params))
    saving.wait()
    assert_same(restored_bits(tmp_path / "a", "tiny"), bits(arrays("tiny").items()))


def test_another_model_is_refused_with_both_shapes(whole: pathlib.Path) -> None:
    layout, mesh = place("tiny", *ONE)
    facts = "num_layers=2, num_heads=6, num_kv_heads=3, vocab_size=262; the program is"
    facts += " for num_layers=9, num_heads=8, num_kv_heads=4, vocab_size=264"
    with pytest.raises(ValueError, match=facts):
        checkpoint.restore_params(whole, layout, mesh)
    other = dataclasses.replace(MODELS["tiny-odd"], rope_theta=5e5)
    layout = dataclasses.replace(layout, config=other)
    with pytest.raises(ValueError, match=r"rope_theta=10000.0; .*rope_theta=500000.0"):
        checkpoint.restore_params(whole, layout, mesh)


def test_a_checkpoint_is_replaced_only_if_asked(tmp_path: pathlib.Path) -> None:
    layout, mesh = place("tiny-odd", *ONE)
    params = put(arrays("tiny-odd"), layout, mesh)
    (tmp_path / "a").mkdir()  # an empty folder is no checkpoint to lose
    checkpoint.save(tmp_path / "a", params, layout, mesh, extra={"age": 1})
    with pytest.raises(ValueError, match="a checkpoint is there already"):
        checkpoint.save(tmp_path / "a", params, layout, mesh)
    checkpoint.save(
        tmp_path / "a", params, layout, mesh, extra={"age": 2}, overwrite=True
    )
    assert checkpoint.open_saved(tmp_path / "a").extra == {"age": 2}
    assert [entry.name for entry in tmp_path.iterdir()] == ["a"]
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("years")
    with pytest.raises(ValueError, match="something else is there"):
        checkpoint.save(tmp_path / "mine", params, layout, mesh, overwrite=True)
    assert (tmp_path / "mine" / "thesis.tex").read_text() == "years"


def test_bad_input_is_refused_before_anything_is_written(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    layout, mesh = place("tiny-odd", *ONE)
    params = put(arrays("tiny-odd"), layout, mesh)
    with pytest.raises(ValueError, match="written as JSON"):
        checkpoint.save(tmp_path / "a", params, layout, mesh, extra={"f": print})
    with pytest.raises(ValueError, match=r"names with '\.orbax-checkpoint-tmp'"):
        checkpoint.save(tmp_path / "a.orbax-checkpoint-tmp", params, layout, mesh)
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(OSError, match="has 1,000 free"):
        checkpoint.save(tmp_path / "a", params, layout, mesh)
    assert list(tmp_path.iterdir()) == []


def test_what_goes_wrong_in_the_background_is_raised(tmp_path: pathlib.Path) -> None:
    layout, mesh = place("tiny-odd", *ONE)
    params = put(arrays("tiny-odd"), layout, mesh)
    saving = checkpoint.save(tmp_path / "a", params, layout, mesh, wait=False)
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "mine").touch()  # no rename onto a folder with something in it
    with pytest.raises(RuntimeError, match=r"was not written: .*already exists"):
        saving.wait()
    with pytest.raises(ValueError, match="it holds mine"):
        checkpoint.open_saved(tmp_path / "a")


def _sealed_again(text: str, **changes: Any) -> str:
    """Returns a seal with `changes`, whose checksum is right."""
    content = {**json.loads(text), **changes}
    del content["crc32"]
    return json.dumps({"crc32": seal._checksum(content), **content})


def _folders(whole: pathlib.Path, at: pathlib.Path) -> dict[str, pathlib.Path]:
    """Returns what is easily taken for a checkpoint."""
    (at / "empty").mkdir()
    (at / "file").write_text("{}")
    hugging_face = at / "hugging_face"
    hugging_face.mkdir()
    (hugging_face / "config.json").write_text("{}")
    (hugging_face / "model.safetensors").touch()
    with ocp.StandardCheckpointer() as other:
        other.save(at / "of_orbax", {"ends": {"embedding": np.ones((4, 4))}})
    shutil.copytree(whole, at / "a.orbax-checkpoint-tmp")
    shutil.copytree(whole, at / "unsealed")
    (at / "unsealed" / seal.NAME).unlink()
    changes: dict[str, Callable[[str], str]] = {
        "cut": lambda text: text[:-10],
        "edited": lambda text: text.replace('"vocab_size": 262', '"vocab_size": 264'),
        "list": lambda text: "[1]",
        "bytes": lambda text: "\0",
        "endless": lambda text: "[" * 100_000,
        "unlike": lambda text: _sealed_again(text, files=[]),
        "foreign": lambda text: _sealed_again(text, config={"layers": 2}),
    }
    for name, change in changes.items():
        shutil.copytree(whole, at / name)
        file = at / name / seal.NAME
        file.write_text(change(file.read_text()))
    return {path.name: path for path in (*at.iterdir(), at / "missing")}


def test_what_is_no_whole_checkpoint_is_refused(
    whole: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    says = {
        "empty": "it holds nothing",
        "file": "there is no such folder",
        "missing": "there is no such folder",
        "hugging_face": "holds config.json, model.safetensors.* experiments.convert",
        "of_orbax": "it has no jaxllm.json",
        "a.orbax-checkpoint-tmp": "whose writing has not ended",
        "unsealed": "it has no jaxllm.json",
        **dict.fromkeys(
            ("cut", "edited", "list", "bytes", "endless", "unlike", "foreign"),
            "is damaged: its jaxllm",
        ),
    }
    folders = _folders(whole, tmp_path)
    assert set(folders) == set(says)
    for name, path in folders.items():
        with pytest.raises(ValueError, match=says[name]):
            checkpoint.open_saved(path)


def test_a_checkpoint_of_a_later_format_says_so(
    whole: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    layout, mesh = place("tiny-odd", *ONE)
    params = put(arrays("tiny-odd"), layout, mesh)
    with monkeypatch.context() as later:
        later.setattr(seal, "_FORMAT", 2)
        checkpoint.save(tmp_path / "a", params, layout, mesh)
    with pytest.raises(ValueError, match="has format 2; this version reads 1"):
        checkpoint.open_saved(tmp_path / "a")


def test_missing_and_cut_files_are_named(
    whole: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    """Whatever file it is, and without reading any array."""
    names = json.loads((whole / seal.NAME).read_text())["files"]
    assert len(names) > 5
    for number, name in enumerate(names):
        copy = tmp_path / str(number)
        shutil.copytree(whole, copy)
        data = (copy / name).read_bytes()
        (copy / name).write_bytes(data[:-1])
        facts = f"{name} has {len(data) - 1} bytes and not {len(data)}"
        with pytest.raises(ValueError, match=facts):
            checkpoint.open_saved(copy)
        (copy / name).unlink()
        with pytest.raises(ValueError, match=f"{name} has no bytes and not"):
            checkpoint.open_saved(copy)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("draw", range(6))
def test_a_changed_byte_never_becomes_another_number(
    draw: int, whole: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    chance = random.Random(draw)
    copy = tmp_path / "copy"
    shutil.copytree(whole, copy)
    files = sorted(path for path in copy.rglob("*") if path.is_file())
    largest = max(files, key=lambda path: path.stat().st_size)
    file = largest if draw % 2 else chance.choice(files)
    data = bytearray(file.read_bytes())
    data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
    file.write_bytes(data)
    try:
        found = restored_bits(copy)
    except ValueError as error:
        assert str(copy) in str(error)  # noqa: PT017
        assert len(str(error)) < 800  # noqa: PT017
        gc.collect()  # Orbax leaves coroutines behind that nobody awaits any more
    else:
        assert_same(found, bits(arrays("tiny-odd").items()))


def test_arrays_that_changed_places_are_noticed(tmp_path: pathlib.Path) -> None:
    """Two layers of equal shape and size, each valid by itself."""
    layout, mesh = place("tiny-odd", *ONE)
    parts = arrays("tiny-odd")
    for name, order in {"right": (0, 1), "wrong": (1, 0)}.items():
        changed = {"ends": parts["ends"], **{i: parts[j] for i, j in enumerate(order)}}
        checkpoint.save(tmp_path / name, put(changed, layout, mesh), layout, mesh)
    right, wrong = (checkpoint.open_saved(tmp_path / n) for n in ("right", "wrong"))
    assert right.fingerprints["0"] == wrong.fingerprints["1"]
    assert right.fingerprints["0"] != right.fingerprints["1"]
    written = (tmp_path / "right" / seal.NAME).read_text()
    files = json.loads((tmp_path / "wrong" / seal.NAME).read_text())["files"]
    content = {**json.loads(written), "files": files}
    del content["crc32"]
    content["crc32"] = seal._checksum(content)
    (tmp_path / "wrong" / seal.NAME).write_text(json.dumps(content))
    facts = r"part 0 of checkpoint .* the fingerprint of attention.w_out is \d+, saved"
    with pytest.raises(ValueError, match=facts):
        restored_bits(tmp_path / "wrong")


# Saves for ever, one set of numbers after the other, into two folders: one is replaced
# in place, the other deleted and made again.
SAVES = """
import itertools, pathlib, shutil, sys
from sharding.target import prepare_environment
prepare_environment(["cpu:8"])
from sharding import checkpoint
from tests import test_checkpoint as t

folder = pathlib.Path(sys.argv[1])
layout, mesh = t.place("tiny-odd", "tp2", "megatron", "unrolled")
params = [t.put(t.arrays("tiny-odd", version=i), layout, mesh) for i in range(4)]
for i in itertools.count():
    name = folder / "ab"[i % 2]
    if i % 2:
        shutil.rmtree(name, ignore_errors=True)
    extra = {"version": i % 4}
    saving = checkpoint.save(
        name, params[i % 4], layout, mesh, extra=extra, wait=False, overwrite=i % 2 == 0
    )
    if i == 3:
        print("going", flush=True)
    saving.wait()
"""


def kill_a_save(folder: pathlib.Path, delay_s: float) -> list[str]:
    """Kills a process that saves, and returns what its folders are then."""
    command = [sys.executable, "-c", SAVES, str(folder)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE) as process:
        assert process.stdout
        assert process.stdout.readline() == b"going\n"
        time.sleep(delay_s)
        process.kill()
    states = []
    for name in ("a", "b"):
        try:
            saved = checkpoint.open_saved(folder / name)
        except ValueError as error:
            states.append(f"{name}: {error}")
            continue
        expected = bits(arrays("tiny-odd", version=saved.extra["version"]).items())
        assert_same(restored_bits(folder / name), expected)
        states.append(f"{name}: version {saved.extra['version']}")
    return states


def test_a_killed_save_leaves_a_whole_checkpoint_or_none(
    tmp_path: pathlib.Path,
) -> None:
    chance = random.Random()
    for _ in range(2):  # in the same folder: each finds what the one before left
        states = kill_a_save(tmp_path, chance.uniform(0, 0.6))
        # What is replaced is there all the time, but between two renames.
        assert "version" in states[0] or "it is whole in a.jaxllm-" in states[0]


def test_a_save_stopped_between_its_two_renames_says_where_both_are(
    whole: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    shutil.copytree(whole, tmp_path / "a.jaxllm-new")
    shutil.copytree(whole, tmp_path / "a.jaxllm-old")
    with pytest.raises(ValueError, match=r"whole in a.jaxllm-new, a.jaxllm-old"):
        checkpoint.open_saved(tmp_path / "a")
    (tmp_path / "a.jaxllm-new").rename(tmp_path / "a")
    assert_same(restored_bits(tmp_path / "a"), bits(arrays("tiny-odd").items()))
