"""One table says how programs are written for a target."""

import dataclasses
from typing import Any

import jax
import pytest

from jaxllm.config import PRESETS
from sharding import choices
from sharding.attention import KERNELS, refusal
from sharding.limits import closed_form_flops
from sharding.partition import Partition, Workload
from sharding.program import Phase, Program
from sharding.target import Target, parse_target

CPU = parse_target("cpu:8")


def on(platform: str, attached: bool = True) -> Target:
    """Returns a target that is only asked what it is."""
    return dataclasses.replace(
        CPU, name=platform, platform=platform, compile_only=not attached
    )


def program(
    phase: Phase = "prefill",
    name: str = "tp8",
    batch: int = 16,
    model: str = "llama-3.1-8b",
    dtype: str = "bfloat16",
) -> Program:
    return Program(
        phase=phase,
        config=PRESETS[model],
        partition=Partition.parse(name),
        workload=Workload(batch_size=batch, input_len=2048, output_len=128),
        dtype=dtype,
    )


@pytest.mark.parametrize(
    ("platform", "phase", "batch_size", "layers"),
    [
        ("tpu", "decode", 16, "scanned"),
        ("cuda", "decode", 16, "unrolled"),
        ("cuda", "prefill", 1, "unrolled"),
        ("cuda", "prefill", 16, "scanned"),
    ],
)
def test_layers_are_a_loop_where_its_copies_do_not_show(
    platform: str, phase: Phase, batch_size: int, layers: str
) -> None:
    asked = program(phase, batch=batch_size)
    assert choices.choose(asked, on(platform, attached=False)).layers == layers


def test_layers_for_text_compile_soon() -> None:
    table = choices.LAYERS_FOR_TEXT
    asked = program("decode", "pp2")
    for platform, layers in (("cpu", "scanned"), ("cuda", "unrolled")):
        found = choices.choose(asked, on(platform), table=table)
        assert (found.layers, found.ticks) == (layers, layers)


def test_ticks_of_many_layers_are_unrolled_only_where_they_run() -> None:
    asked = dataclasses.replace(
        program("decode", "pp8", 16), config=PRESETS["llama-3.1-70b"]
    )
    found = [choices.choose(asked, on("cuda", there)).ticks for there in (True, False)]
    assert found == ["unrolled", "scanned"]


@pytest.mark.parametrize(
    ("platform", "weights", "batch", "ticks"),
    [
        ("cuda", "int4", 16, "unrolled"),
        ("cuda", "int4", 2, "unrolled"),  # one group
        ("cuda", "int8", 16, "scanned"),
        ("cpu", "int4", 16, "scanned"),
    ],
)
def test_no_loop_stands_around_groups_on_nvidia_gpus(
    platform: str, weights: Any, batch: int, ticks: str
) -> None:
    asked = dataclasses.replace(
        program("decode", "pp8", batch, model="llama-3.1-70b"), weights=weights
    )
    assert choices.choose(asked, on(platform, attached=False)).ticks == ticks


@pytest.mark.parametrize(
    ("name", "batch", "attached", "layers", "ticks"),
    [
        ("tp8", 16, True, "auto", "scanned"),  # there are none
        ("pp8", 16, True, "auto", "unrolled"),
        ("pp8", 2, True, "auto", "unrolled"),
        ("pp8", 16, False, "auto", "unrolled"),
        ("pp8", 2, False, "auto", "scanned"),  # one group, one slot
        ("pp8", 16, True, "scanned", "scanned"),
    ],
)
def test_ticks_are_unrolled_where_slots_would_be_copied(
    name: str, batch: int, attached: bool, layers: str, ticks: str
) -> None:
    asked = program("decode", name, batch)
    found = choices.choose(asked, on("cuda", attached), layers=layers)
    assert found.ticks == ticks


@pytest.mark.parametrize(
    ("platform", "attached", "phase", "dtype", "attention"),
    [
        ("cuda", True, "prefill", "bfloat16", "cudnn"),
        ("cuda", True, "prefill", "float32", "blocks"),
        ("cuda", True, "decode", "bfloat16", "blocks"),
        ("cuda", False, "prefill", "bfloat16", "cudnn"),
        ("rocm", True, "prefill", "bfloat16", "blocks"),
        ("cpu", True, "prefill", "bfloat16", "blocks"),
        ("tpu", False, "prefill", "bfloat16", "blocks"),
    ],
)
def test_cudnn_is_for_prompts_on_nvidia_gpus(
    platform: str, attached: bool, phase: Phase, dtype: str, attention: str
) -> None:
    found = choices.choose(program(phase, dtype=dtype), on(platform, attached))
    assert found.attention == attention


@pytest.mark.parametrize(
    ("name", "attached", "dtype", "kv", "layers", "token"),
    [
        ("tp1", True, "bfloat16", None, "auto", "triton"),
        ("tp1", False, "bfloat16", None, "auto", "einsum"),
        ("tp2", True, "bfloat16", None, "auto", "triton"),
        ("pp2", True, "bfloat16", None, "auto", "triton"),
        ("tp1", True, "float32", None, "auto", "einsum"),
        ("tp1", True, "bfloat16", "int8", "auto", "einsum"),  # the kernel cannot
        ("tp1", True, "bfloat16", None, "scanned", "einsum"),
    ],
)
def test_the_kernel_of_a_token_is_where_it_was_timed_and_can_be(
    name: str, attached: bool, dtype: str, kv: Any, layers: str, token: str
) -> None:
    asked = dataclasses.replace(program("decode", name, dtype=dtype), kv=kv)
    found = choices.choose(asked, on("cuda", attached), layers=layers)
    assert found.token_attention == token
    plain = choices.choose(
        asked, on("cuda"), layers=layers, changes={"token_attention": "einsum"}
    )
    assert plain.token_attention == "einsum"


@pytest.mark.parametrize(
    ("name", "batch", "attached", "dtype", "residual"),
    [
        ("tp1", 64, True, "bfloat16", "triton_split"),
        ("tp2", 64, True, "bfloat16", "triton_split"),
        ("pp2", 64, True, "bfloat16", "triton_split"),
        ("tp1", 128, True, "bfloat16", "plain"),  # there is nothing to sum
        ("tp2", 128, True, "bfloat16", "triton"),
        ("tp2", 1024, True, "bfloat16", "triton"),
        ("tp4", 64, True, "bfloat16", "plain"),  # not timed
        ("tp2", 64, False, "bfloat16", "plain"),
        ("tp2", 64, True, "float32", "plain"),
    ],
)
def test_the_kernel_that_sums_is_where_it_was_timed_and_can_be(
    name: str, batch: int, attached: bool, dtype: str, residual: str
) -> None:
    asked = program("decode", name, batch, dtype=dtype)
    assert choices.choose(asked, on("cuda", attached)).residual == residual
    asked = program("prefill", name, batch, dtype=dtype)
    prompt = choices.choose(asked, on("cuda", attached))
    assert prompt.residual == "plain"
    sums = name == "tp2" and attached and dtype == "bfloat16"
    assert prompt.prompt_residual == ("triton" if sums else "plain")


def test_a_prompt_in_halves_has_its_own_sums() -> None:
    asked = program("prefill", "tp2", 64)
    found = choices.choose(asked, on("cuda", True), changes={"overlap": "rows"})
    assert (found.overlap, found.prompt_residual) == ("rows", "plain")


@pytest.mark.parametrize(
    ("name", "attached", "changes", "last"),
    [
        ("tp2", True, {}, "last"),
        ("dp2_tp2", True, {}, "last"),
        ("tp2", True, {"last_layer": "all"}, "all"),
        ("tp2", True, {"overlap": "rows"}, "all"),
        ("pp2", True, {}, "last"),
        ("pp2", True, {"last_layer": "all"}, "all"),
        ("tp2_pp2", True, {}, "all"),  # not timed
        ("tp2", False, {}, "all"),
        ("pp2", False, {}, "all"),
    ],
)
def test_the_last_layer_is_short_where_nothing_reads_the_rest(
    name: str, attached: bool, changes: dict[str, str], last: str
) -> None:
    asked = program("prefill", name, 64)
    found = choices.choose(
        asked, on("cuda", attached), layers="unrolled", changes=changes
    )
    assert found.last_layer == last


@pytest.mark.parametrize(
    ("platform", "phase", "attached", "changes", "rotation"),
    [
        ("cuda", "prefill", True, {}, "flipped"),
        ("cuda", "prefill", True, {"rotation": "joined"}, "joined"),
        ("cuda", "decode", True, {"rotation": "flipped"}, "joined"),  # of prompts
        ("cuda", "prefill", False, {}, "joined"),
        ("tpu", "prefill", True, {}, "joined"),
    ],
)
def test_prompts_are_rotated_as_the_platform_reads_them(
    platform: str, phase: Phase, attached: bool, changes: dict[str, str], rotation: str
) -> None:
    asked = program(phase, "tp2")
    found = choices.choose(asked, on(platform, attached), changes=changes)
    assert found.rotation == rotation


def test_a_rotation_that_is_not_known_is_refused() -> None:
    with pytest.raises(ValueError, match="no rotation 'turned'; there are joined, fl"):
        dataclasses.replace(program(), rotation="turned")


@pytest.mark.parametrize(
    ("name", "batch", "attached", "how", "triton"),
    [
        ("tp1", 16, True, {}, "False"),
        ("pp2", 16, True, {}, "False"),
        ("tp1", 1, True, {}, None),  # few tokens
        ("tp2", 16, True, {}, None),  # sums add and norm
        ("tp1", 16, False, {}, None),
        ("tp1", 16, True, {"weights": "int8"}, None),  # wide only inside a product
        ("tp1", 16, True, {"phase": "decode"}, None),
    ],
)
def test_products_of_long_prompts_are_left_to_the_library(
    name: str, batch: int, attached: bool, how: dict[str, Any], triton: str | None
) -> None:
    asked = dataclasses.replace(program("prefill", name, batch), **how)
    found = choices.choose(asked, on("cuda", attached))
    options = dict(found.compiler_options)
    assert options.get("xla_gpu_enable_triton_gemm") == triton


def test_options_that_are_asked_for_stand_beside_those_of_the_table() -> None:
    changes = {"xla_gpu_enable_pdl": "False"}
    found = choices.choose(program("prefill", "tp1"), on("cuda"), changes=changes)
    assert dict(found.compiler_options) == {
        "xla_gpu_enable_triton_gemm": "False", **changes
    }  # fmt: skip
    changes = {"xla_gpu_enable_triton_gemm": "True"}
    found = choices.choose(program("prefill", "tp1"), on("cuda"), changes=changes)
    assert dict(found.compiler_options) == changes


@pytest.mark.parametrize(
    ("name", "how", "reason"),
    [
        ("tp2", {"phase": "decode"}, "phase decode"),
        ("tp2", {"layers": "scanned"}, "layers 'scanned'"),
        ("tp2", {"overlap": "rows"}, "overlap 'rows'"),
        ("pp2", {}, "ticks 'scanned'"),
        ("tp2", {"partition": Partition.parse("tp2", "sequence")}, "rules 'seq"),
    ],
)
def test_a_short_last_layer_is_refused_where_more_of_it_is_read(
    name: str, how: dict[str, Any], reason: str
) -> None:
    asked = dataclasses.replace(program("prefill", name, 64), layers="unrolled")
    with pytest.raises(ValueError, match=f"last_layer 'last' with .*{reason}.* Use"):
        dataclasses.replace(asked, last_layer="last", **how)


def test_both_phases_share_parameters_and_cache() -> None:
    prefill, decode = choices.choose_both(
        program("prefill", "pp8"), program("decode", "pp8"), on("cuda")
    )
    assert prefill.layout == decode.layout
    assert (prefill.layers, prefill.ticks) == ("unrolled", "unrolled")
    assert (prefill.attention, decode.attention) == ("cudnn", "blocks")


def test_cudnn_is_refused_where_it_cannot_work() -> None:
    asked = dataclasses.replace(
        program(model="tiny", dtype="bfloat16"),
        config=dataclasses.replace(PRESETS["tiny"], head_dim=16),
    )
    asked = dataclasses.replace(asked, attention="cudnn")
    with pytest.raises(ValueError, match=r"target cpu:8, .*Use attention="):
        asked.compile(CPU)
    for attached in (True, False):
        target = on("cuda", attached)
        assert refusal("cudnn", asked.config, "bfloat16", target) is None
    wide = dataclasses.replace(asked.config, head_dim=256)
    with pytest.raises(ValueError, match=r"heads 256 wide.*multiples of 8 up to 128"):
        dataclasses.replace(asked, config=wide)
    with pytest.raises(ValueError, match="in float32: its kernel takes bfloat16"):
        dataclasses.replace(asked, dtype="float32")
    with pytest.raises(ValueError, match="no attention 'flash'; there are blocks"):
        dataclasses.replace(asked, attention="flash")  # pyright: ignore


def test_what_aborts_the_compiler_is_refused() -> None:
    asked = program("decode", "dp2_tp2_pp2")
    assert dataclasses.replace(asked, ragged=True)
    shared = Partition.parse("dp2_tp2_pp2", "two_d")
    asked = dataclasses.replace(asked, partition=shared)
    with pytest.raises(ValueError, match=r"different lengths.*Use equal lengths"):
        dataclasses.replace(asked, ragged=True)


def test_ticks_are_not_unrolled_around_scanned_layers() -> None:
    asked = program("decode", "pp8")
    with pytest.raises(ValueError, match="Unroll the layers as well"):
        dataclasses.replace(asked, layers="scanned", ticks="unrolled")


@pytest.mark.parametrize("name", ["tp2", "pp2", "dp2_tp2_pp2"])
def test_cudnn_is_called_with_the_arrays_of_one_device(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As JAX lowers it for CUDA, which needs no GPU; compiling it would."""
    library = pytest.importorskip("jax._src.cudnn.fused_attention_stablehlo")
    monkeypatch.setattr(library, "check_cudnn_version", lambda: 91000)
    partition = Partition.parse(name)
    asked = dataclasses.replace(
        program(name=name),
        attention="cudnn",
        config=dataclasses.replace(PRESETS["llama-3.1-8b"], num_layers=2),
    )
    target = parse_target(f"h100:{partition.num_devices}")
    mesh = jax.sharding.Mesh(
        target.mesh_devices(partition.shape), ("data", "stage", "tensor")
    )
    text = asked.lower(mesh).as_text()
    assert "CustomSPMDPartitioning" not in text
    assert "__cudnn$fmhaSoftmax" in text
    # What the ledger prices the call by.
    shape, heads = asked.layout, 32 // partition.tensor
    rows = shape.replica_batch // asked.prefill_micro_batches
    sizes = ", ".join(f'"{size}"' for size in (rows, heads, 2048, 2048))
    assert f'"dimensions": [{sizes}]' in text.replace("\\22", '"')
    assert '"mask_type": "CAUSAL"' in text.replace("\\22", '"')


def test_scores_are_those_of_the_tiles_at_and_below_the_diagonal() -> None:
    # 4 x 512, and 16 x 128.
    assert KERNELS["blocks"].scores(2048) == 10 * 512**2
    assert KERNELS["cudnn"].scores(2048) == 136 * 128**2
    assert KERNELS["cudnn"].scores(100) == 100**2
    blocks = program()
    cudnn = dataclasses.replace(blocks, attention="cudnn")
    saved = closed_form_flops(blocks) - closed_form_flops(cudnn)
    # 32 layers of 4 heads of 128, of 16 sequences.
    assert saved == 32 * 16 * 4 * 4 * 128 * (10 * 512**2 - 136 * 128**2)
