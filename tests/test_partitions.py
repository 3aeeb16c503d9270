"""Partitions change where the model runs, not what it computes."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.custom_partitioning import custom_partitioning

from jaxllm.config import PRESETS
from jaxllm.decode import GREEDY, Sampling
from jaxllm.model import Layers, init_params
from sharding.attention import KERNELS, Attention, Kernel, Token
from sharding.layout import Layout, Ticks
from sharding.mesh import make_mesh
from sharding.overlap import Overlap
from sharding.partition import Partition, Workload
from sharding.program import LastLayer, Program, Rotation
from sharding.residual import PromptResidual, Residual
from sharding.rules import AxisRules
from sharding.run import answers
from sharding.target import parse_target
from sharding.tensor import RULES

BATCH, PROMPT, TOKENS = 16, 12, 9
MODELS = {
    **PRESETS,
    # As few layers as make stages uneven; "tiny" has 9, for 8 stages.
    "tiny-3": dataclasses.replace(PRESETS["tiny"], num_layers=3),
    "tiny-5": dataclasses.replace(PRESETS["tiny"], num_layers=5),
    "tiny-tied": dataclasses.replace(PRESETS["tiny-tied"], num_layers=5),
    # Neither the hidden width 112 nor the vocabulary divides by 3 or 6.
    "tiny-odd": dataclasses.replace(
        PRESETS["tiny"], num_layers=3, num_heads=6, num_kv_heads=3, vocab_size=265
    ),
}
MODELS["tiny-wide"] = dataclasses.replace(
    PRESETS["tiny"], head_dim=16, num_layers=3, embed_dim=64
)
DRAWN = Sampling(temperature=0.8, top_k=100, top_p=0.9)


def run(
    model: str,
    name: str,
    rules: str,
    layers: Layers,
    ragged: bool,
    batch: int,
    sampling: Sampling = GREEDY,
    ticks: Ticks = "scanned",
    attention: Attention = "blocks",
    rotation: Rotation = "joined",
    token_attention: Token = "einsum",
    residual: Residual = "plain",
    prompt_residual: PromptResidual = "plain",
    overlap: Overlap = "none",
    last_layer: LastLayer = "all",
    micro_batches: int | None = None,
) -> tuple[np.ndarray, np.ndarray, Layout]:
    """Returns tokens [TOKENS, B] and the logits [TOKENS, B, V] they come from."""
    config, partition = MODELS[model], Partition.parse(name, rules)
    target = parse_target(f"cpu:{partition.num_devices}")
    prefill, decode = (
        Program(
            phase=phase,
            config=config,
            partition=partition,
            workload=Workload(
                batch_size=batch, input_len=PROMPT, output_len=TOKENS + 1
            ),
            dtype="float32",
            layers=layers,
            ticks=ticks,
            attention=attention,
            rotation=rotation if phase == "prefill" else "joined",
            token_attention=token_attention if phase == "decode" else "einsum",
            residual=residual if phase == "decode" else "plain",
            prompt_residual=prompt_residual if phase == "prefill" else "plain",
            overlap=overlap if phase == "prefill" else "none",
            last_layer=last_layer if phase == "prefill" else "all",
            micro_batches=micro_batches if phase == "prefill" else None,
            ragged=ragged,
            with_logits=True,
            sampling=sampling,
        )
        for phase in ("prefill", "decode")
    )
    rng = np.random.default_rng(0)
    # Sequences do not depend on the batch, so any is compared with one of BATCH.
    prompts = rng.integers(0, config.vocab_size, (BATCH, PROMPT), np.int32)[:batch]
    lengths = rng.integers(3, PROMPT + 1, BATCH, np.int32)[:batch]
    seeds = None
    if not sampling.is_greedy:
        seeds = rng.integers(0, 2**32, BATCH, np.uint32)[:batch]
    tokens, logits = answers(
        prefill,
        decode,
        target,
        lambda layout, mesh: layout.place_params(parameters(model), mesh),
        prompts,
        *((lengths,) if ragged else ()),
        count=TOKENS,
        seeds=seeds,
    )
    return tokens, logits, prefill.layout


@functools.cache
def parameters(model: str):
    return init_params(MODELS[model], "float32")


@functools.cache
def _one_device(model: str, ragged: bool, sampling: Sampling):
    return run(model, "tp1", "megatron", "scanned", ragged, BATCH, sampling)


def one_device(
    model: str, ragged: bool, batch: int, sampling: Sampling = GREEDY
) -> tuple[np.ndarray, np.ndarray]:
    """Returns the tokens and logits of the first `batch` sequences."""
    tokens, logits, _ = _one_device(model, ragged, sampling)
    return tokens[:, :batch], logits[:, :batch]


CASES = [
    # Unrolled layers, one device.
    ("tiny-3", "tp1", "megatron", "unrolled", False, BATCH),
    ("tiny-3", "tp2", "megatron", "unrolled", False, BATCH),
    # More tensor devices than the 4 key/value heads.
    ("tiny-3", "tp8", "megatron", "scanned", False, BATCH),
    ("tiny-3", "tp8", "kv_seq", "unrolled", False, BATCH),
    ("tiny-3", "tp4", "sequence", "unrolled", False, BATCH),
    ("tiny-3", "dp2_tp4", "two_d", "unrolled", False, BATCH),
    ("tiny-3", "tp2", "replicated", "scanned", False, BATCH),
    ("tiny-3", "dp8", "megatron", "scanned", False, BATCH),
    ("tiny-3", "dp2_tp4", "megatron", "unrolled", False, BATCH),
    # Uneven stages everywhere.
    ("tiny-3", "pp2", "megatron", "unrolled", False, BATCH),
    ("tiny-5", "pp4", "megatron", "scanned", False, BATCH),
    ("tiny", "pp8", "megatron", "unrolled", False, BATCH),
    # Fewer sequences than stages: one group walks through.
    ("tiny", "pp8", "megatron", "scanned", False, 2),
    ("tiny-3", "tp4_pp2", "megatron", "unrolled", False, 1),
    ("tiny-5", "tp2_pp4", "megatron", "unrolled", False, BATCH),
    ("tiny-3", "tp4_pp2", "sequence", "scanned", False, BATCH),
    ("tiny-3", "tp4_pp2", "kv_seq", "scanned", False, BATCH),
    ("tiny-3", "dp2_tp2_pp2", "two_d", "scanned", False, BATCH),
    ("tiny-3", "dp2_tp2_pp2", "megatron", "unrolled", False, BATCH),
    ("tiny-tied", "tp2_pp4", "megatron", "unrolled", False, BATCH),
    ("tiny-tied", "dp2_tp4", "kv_seq", "scanned", False, BATCH),
    # Prompts of different lengths, each with its own position.
    ("tiny-3", "tp4", "megatron", "scanned", True, BATCH),
    ("tiny-3", "tp4", "kv_seq", "scanned", True, BATCH),
    ("tiny-3", "dp2_tp2_pp2", "megatron", "scanned", True, BATCH),
    ("tiny", "pp8", "megatron", "scanned", True, 2),
    # Hidden width and vocabulary filled up with zeros; 6 copies of 3 heads.
    ("tiny-odd", "tp6", "megatron", "scanned", False, BATCH),
    ("tiny-odd", "tp3_pp2", "megatron", "unrolled", True, BATCH),
]


@pytest.mark.parametrize(
    ("model", "name", "rules", "layers", "ragged", "batch"),
    CASES,
    ids=["-".join(map(str, case)) for case in CASES],
)
def test_equals_one_device(
    model: str, name: str, rules: str, layers: Layers, ragged: bool, batch: int
) -> None:
    tokens, logits, layout = run(model, name, rules, layers, ragged, batch)
    expected_tokens, expected_logits = one_device(model, ragged, batch)
    np.testing.assert_allclose(logits, expected_logits, atol=1e-4, rtol=1e-4)
    np.testing.assert_array_equal(tokens, expected_tokens)
    assert layout.groups in (1, layout.partition.stage)


@pytest.mark.parametrize(
    ("model", "name", "rules", "ragged", "batch", "sampling"),
    [
        ("tiny-3", "pp2", "megatron", False, BATCH, GREEDY),
        ("tiny", "pp8", "megatron", False, BATCH, GREEDY),
        ("tiny-5", "tp2_pp4", "megatron", True, BATCH, GREEDY),
        ("tiny-3", "dp2_tp2_pp2", "two_d", False, BATCH, GREEDY),
        ("tiny-3", "tp4_pp2", "kv_seq", True, BATCH, GREEDY),
        ("tiny-3", "tp4_pp2", "sequence", False, BATCH, GREEDY),
        ("tiny-odd", "tp3_pp2", "megatron", True, BATCH, DRAWN),
        ("tiny-5", "dp2_pp4", "megatron", True, BATCH, DRAWN),
        # One group, which every stage but one must not write for.
        ("tiny", "pp8", "megatron", True, 2, GREEDY),
        ("tiny-3", "tp4_pp2", "megatron", False, 1, GREEDY),
        ("tiny-5", "pp4", "megatron", True, 2, DRAWN),
    ],
)
def test_unrolled_ticks_equal_one_device(
    model: str, name: str, rules: str, ragged: bool, batch: int, sampling: Sampling
) -> None:
    tokens, logits, layout = run(
        model, name, rules, "unrolled", ragged, batch, sampling, "unrolled"
    )
    expected_tokens, expected_logits = one_device(model, ragged, batch, sampling)
    np.testing.assert_allclose(logits, expected_logits, atol=1e-4, rtol=1e-4)
    np.testing.assert_array_equal(tokens, expected_tokens)
    slots = layout.named_state().cache[0]
    assert len(slots) == layout.groups


@pytest.mark.parametrize(
    ("name", "rules", "layers", "ragged"),
    [
        ("tp1", "megatron", "unrolled", False),
        ("tp8", "megatron", "scanned", False),  # each head twice
        ("tp4", "sequence", "unrolled", False),
        ("tp4", "kv_seq", "unrolled", True),
        ("tp2", "replicated", "unrolled", False),
        ("dp2_tp4", "megatron", "unrolled", True),
        ("dp2_tp4", "two_d", "unrolled", False),
        ("pp2", "megatron", "unrolled", False),
        ("tp4_pp2", "kv_seq", "scanned", False),
        ("dp2_tp2_pp2", "megatron", "unrolled", False),
        ("dp2_tp2_pp2", "two_d", "unrolled", False),
    ],
)
def test_a_kernel_sees_the_arrays_of_one_device(
    name: str,
    rules: str,
    layers: Layers,
    ragged: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Plain attention in the place of a kernel that the compiler cannot split."""
    seen: list[tuple[int, ...]] = []

    def opaque(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        seen.append(q.shape)
        return _opaque(q, k, v)

    kernel = Kernel(function=opaque, is_opaque=True)
    monkeypatch.setitem(KERNELS, "cudnn", kernel)
    tokens, logits, layout = run(
        "tiny-3", name, rules, layers, ragged, BATCH, attention="cudnn"
    )
    expected_tokens, expected_logits = one_device("tiny-3", ragged, BATCH)
    np.testing.assert_allclose(logits, expected_logits, atol=1e-4, rtol=1e-4)
    np.testing.assert_array_equal(tokens, expected_tokens)
    partition, model = layout.partition, layout.model
    heads = model.num_kv_heads // partition.ways("heads")
    assert {shape[2] for shape in seen} == {heads}


@pytest.mark.parametrize(
    ("name", "ragged", "batch", "residual"),
    [
        ("tp8", False, 2, "triton"),  # copies of heads
        ("tp2_pp2", True, 4, "triton_split"),  # idle ticks leave the cache alone
        ("dp2_pp2", False, 2, "triton"),  # one group walks through
    ],
)
def test_kernels_equal_one_device(
    name: str, ragged: bool, batch: int, residual: Residual
) -> None:
    model = "tiny-wide"
    tokens, logits, _ = run(
        model, name, "megatron", "unrolled", ragged, batch, ticks="unrolled",
        token_attention="triton", residual=residual, prompt_residual="triton",
    )  # fmt: skip
    want_tokens, want_logits = one_device(model, ragged, batch)
    np.testing.assert_array_equal(tokens, want_tokens)
    np.testing.assert_allclose(logits, want_logits, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "rules", "layers", "ragged", "batch", "micro_batches"),
    [
        ("tp2", "kv_seq", "scanned", True, 4, None),
        ("dp2_tp2", "megatron", "unrolled", True, BATCH, 2),
        (
            "tp2_pp2",
            "megatron",
            "unrolled",
            False,
            BATCH,
            2,
        ),  # idle ticks write nothing
    ],
)
def test_halves_in_turns_equal_one_device(
    name: str,
    rules: str,
    layers: Layers,
    ragged: bool,
    batch: int,
    micro_batches: int | None,
) -> None:
    tokens, logits, _ = run(
        "tiny-3", name, rules, layers, ragged, batch, ticks=layers,
        overlap="rows", micro_batches=micro_batches,
    )  # fmt: skip
    want_tokens, want_logits = one_device("tiny-3", ragged, batch)
    np.testing.assert_array_equal(tokens, want_tokens)
    np.testing.assert_allclose(logits, want_logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("tp4", {"heads": (), "cache_seq": ("tensor",)}),
        (
            "dp2_tp2",
            {"batch": (), "cache_batch": (), "cache_seq": ("data", "tensor")},
        ),
    ],
)
def test_positions_split_otherwise_than_heads_equal_one_device(
    name: str, changes: dict[str, tuple[str, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A table of one's own."""
    table = {**RULES["kv_seq"].table, **changes}
    monkeypatch.setitem(RULES, "own", AxisRules(name="own", table=table))
    tokens, logits, _ = run("tiny-3", name, "own", "unrolled", False, 4)
    want_tokens, want_logits = one_device("tiny-3", False, 4)
    np.testing.assert_array_equal(tokens, want_tokens)
    np.testing.assert_allclose(logits, want_logits, atol=1e-4, rtol=1e-4)


def _never(*_: object) -> None:
    raise AssertionError("the kernel was left to the partitioner")


def _plain(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """Returns causal attention from all scores at once."""
    scores = jnp.einsum("BtKGH,BsKH->BKGts", q, k) * q.shape[-1] ** -0.5
    seen = jnp.tri(q.shape[1], dtype=bool)[None, None, None]
    weights = jax.nn.softmax(jnp.where(seen, scores, -jnp.inf), axis=-1)
    return jnp.einsum("BKGts,BsKH->BtKGH", weights, v)


# As cuDNN's kernel in JAX: a call with rules of its own for the partitioner, which
# need not work inside a `jax.shard_map` over some axes.
_opaque = custom_partitioning(_plain)
_opaque.def_partition(
    partition=_never,
    infer_sharding_from_operands=_never,
    sharding_rule="b t k g h, b t k h, b t k h -> b t k g h",
)


@pytest.mark.parametrize(
    ("model", "name", "ragged", "batch"),
    [
        ("tiny-3", "tp8", True, BATCH),
        ("tiny-odd", "tp3_pp2", False, BATCH),
        ("tiny-5", "dp2_pp4", True, BATCH),
        ("tiny-5", "pp4", True, 2),
    ],
)
def test_draws_do_not_depend_on_the_partition(
    model: str, name: str, ragged: bool, batch: int
) -> None:
    tokens, logits, _ = run(model, name, "megatron", "scanned", ragged, batch, DRAWN)
    expected, _ = one_device(model, ragged, batch, DRAWN)
    np.testing.assert_array_equal(tokens, expected)
    assert (tokens != logits.argmax(-1)).any()  # it was a draw


@pytest.mark.parametrize(
    ("name", "rules", "path", "shape"),
    [
        # Whole [48, 4 * (2 + 2) * 10] and [48, 2 * 112].
        ("tp4", "megatron", "w_qkv", (48, 40)),
        ("tp8", "megatron", "w_qkv", (48, 30)),  # heads twice: [48, 8 * (1 + 2) * 10]
        ("tp4", "megatron", "w_gate_up", (48, 56)),
        ("dp2_tp4", "two_d", "w_gate_up", (24, 56)),
        ("tp4", "replicated", "w_gate_up", (48, 224)),
        ("tp2_pp4", "megatron", "w_gate_up", (1, 48, 112)),
    ],
)
def test_each_device_holds_its_part(
    name: str, rules: str, path: str, shape: tuple[int, ...]
) -> None:
    config, partition = PRESETS["tiny"], Partition.parse(name, rules)
    workload = Workload(batch_size=8, input_len=12, output_len=4)
    layout = Layout(
        config=config, partition=partition, workload=workload, dtype="float32"
    )
    target = parse_target(f"cpu:{partition.num_devices}")
    mesh = make_mesh(target.mesh_devices(partition.shape))
    placed = layout.place_params(parameters("tiny"), mesh)
    block = placed.blocks[0]
    weight = {**block["attention"], **block["mlp"]}[path]
    assert weight.addressable_shards[0].data.shape == shape


@pytest.mark.parametrize(
    ("model", "name", "ragged", "batch", "residual"),
    [
        ("tiny-3", "tp1", True, BATCH, "plain"),
        ("tiny-wide", "tp8", True, BATCH, "triton"),  # copies of heads
        ("tiny-3", "dp2_tp2", False, BATCH, "plain"),
        ("tiny-3", "pp2", True, BATCH, "plain"),  # of zeros
        ("tiny-3", "tp2_pp3", True, 12, "plain"),
        ("tiny-3", "pp3", False, 1, "plain"),
    ],
)
def test_the_last_layer_is_read_at_the_last_position(
    model: str, name: str, ragged: bool, batch: int, residual: PromptResidual
) -> None:
    stages = Partition.parse(name).stage
    tokens, logits, _ = run(
        model, name, "megatron", "unrolled", ragged, batch,
        ticks="unrolled" if stages > 1 else "scanned", prompt_residual=residual,
        last_layer="last", rotation="flipped", micro_batches=min(batch, 2 * stages),
    )  # fmt: skip
    want_tokens, want_logits = one_device(model, ragged, batch)
    np.testing.assert_array_equal(tokens, want_tokens)
    np.testing.assert_allclose(logits, want_logits, atol=1e-4, rtol=1e-4)
