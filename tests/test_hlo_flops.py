"""FLOPs: a multiply-add is 2, arithmetic 1 an element, moving data nothing."""

import itertools

import pytest

from sharding.hlo import read_ledger
from sharding.hlo.windows import WindowDim, valid_positions


def _flops(body: str, before: str = "") -> tuple[int, int]:
    ledger = read_ledger(
        f"HloModule m\n{before}\nENTRY %e () -> f32[] {{\n{body}\n}}\n"
    )
    return ledger.flops, ledger.matmul_flops


def _parameters(*shapes: str) -> str:
    return "\n".join(
        f"  %{name} = {shape} parameter({i})"
        for i, (name, shape) in enumerate(zip("abcdef", shapes, strict=False))
    )


ADD = """
%add (x: f32[], y: f32[]) -> f32[] {
  %x = f32[] parameter(0)
  %y = f32[] parameter(1)
  ROOT %s = f32[] add(%x, %y)
}
"""


@pytest.mark.parametrize(
    ("shapes", "line", "flops"),
    [
        (["f32[3,5]", "f32[3,5]"], "f32[3,5] add(%a, %b)", 15),
        (["f32[3,5]"], "f32[3,5] exponential(%a)", 15),
        (["f32[3,5]", "f32[3,5]"], "pred[3,5] compare(%a, %b), direction=LT", 15),
        (["f32[3,5]"], "bf16[3,5] convert(%a)", 0),
        (["f32[3,5]"], "f32[5,3] transpose(%a), dimensions={1,0}", 0),
        (["f32[3,5]"], "f32[7,3,5] broadcast(%a), dimensions={1,2}", 0),
        (["f32[3,5]", "f32[]"], "f32[3] reduce(%a, %b), dimensions={1}, to_apply=%add",
         15 - 3),
        # log2(8) = 3 comparisons an element
        (["f32[2,8]"], "f32[2,8] sort(%a), dimensions={1}, to_apply=%add", 16 * 3),
        # windows of 3 on 10, padded by 1: 10*3 - 2 elements met, 10 results
        (["f32[10]", "f32[]"],
         "f32[10] reduce-window(%a, %b), window={size=3 pad=1_1}, to_apply=%add",
         28 - 10),
        # every window sees all 10: one reduction, written as TPU writes it
        (["f32[10]", "f32[]"],
         "f32[10] reduce-window(%a, %b), window={size=19 pad=9_9}, to_apply=%add", 9),
        (["f32[9,4]", "s32[2,1]", "f32[2,4]"],
         "f32[9,4] scatter(%a, %b, %c), to_apply=%add", 8),
        (["f32[2,8]"],
         '(f32[2,2], s32[2,2]) custom-call(%a), custom_call_target="TopK"', 16 * 2),
        (["f32[2,6,6]"], 'f32[2,6,6] custom-call(%a), custom_call_target="Cholesky"',
         2 * 6**3 // 3),
        (["f32[2,6,6]"],
         'f32[2,6,6] custom-call(%a), custom_call_target="CompactWyHelper"',
         2 * 6**3 // 3),
        (["f32[2,6,6]"], '(f32[2,6,6], s32[2,6], s32[2,6]) custom-call(%a),'
         ' custom_call_target="LuRealDecompositionBlock"', 2 * 2 * 6**3 // 3),
        (["f32[2,6,6]"], '(f32[2,6,6], f32[2,6], s32[2]) custom-call(%a),'
         ' custom_call_target="lapack_ssyevd_ffi"', 2 * 9 * 6**3),
        (["f32[2,3,3]"] * 4, '(f32[2,3], f32[2,3], f32[2,3,3], f32[2,3,3], f32[2,3,3],'
         ' f32[2,3,3]) custom-call(%a, %b, %c, %d), custom_call_target="EighTpu"',
         2 * 9 * 6**3),  # four quarters
        (["f32[2,6,4]"], '(f32[2,6,4], f32[2,4]) custom-call(%a),'
         ' custom_call_target="QrDecompositionBlock"', 2 * 2 * 4**2 * (3 * 6 - 4) // 3),
        (["f32[2,4,6]"], '(f32[2,4,6], f32[2,4], s32[2]) custom-call(%a),'
         ' custom_call_target="cusolver_gesvd_ffi"', 2 * 4 * 4 * (14 * 6 + 8 * 4)),
        (["f32[6,4]", "f32[4]", "f32[6,5]"], 'f32[6,5] custom-call(%a, %b, %c),'
         ' custom_call_target="lapack_sormqr_ffi"', 5 * 2 * 4 * (2 * 6 - 4)),
        (["f32[8]"], 'f32[3] custom-call(%a),'
         ' custom_call_target="xla_ffi_python_cpu_callback"', 0),
        (["f32[8]"], '() custom-call(%a), custom_call_target="Sharding"', 0),
    ],
)  # fmt: skip
def test_operation(shapes: list[str], line: str, flops: int) -> None:
    body = f"{_parameters(*shapes)}\n  ROOT %r = {line}"
    assert _flops(body, ADD) == (flops, 0)


M, N, K, B = 3, 5, 7, 2


@pytest.mark.parametrize(
    ("lhs", "rhs", "line"),
    [
        (f"f32[{B},{M},{K}]", f"f32[{B},{K},{N}]",
         f"f32[{B},{M},{N}] dot(%a, %b), lhs_batch_dims={{0}},"
         " lhs_contracting_dims={2}, rhs_batch_dims={0}, rhs_contracting_dims={1}"),
        # batch as a spatial dimension of the window, as TPU writes it: dilated, and
        # only the position where lhs and rhs have the same batch index counts
        (f"f32[{B},{M},{K}]", f"f32[{B},{K},{N}]",
         f"f32[{B},{M},{N}] convolution(%a, %b), window={{size={B} stride={B - 1}"
         f" lhs_dilate={B}}}, dim_labels=0bf_0io->0bf"),
        (f"f32[{B},{M},{K}]", f"f32[{B},{K},{N}]",
         f'(f32[{B},{M},{N}], s8[4096]) custom-call(%a, %b), custom_call_target='
         '"__cublas$lt$matmul", backend_config={"gemm_backend_config":{"epilogue":'
         '"DEFAULT","beta":0,"dot_dimension_numbers":{"lhs_contracting_dimensions":'
         '["2"],"lhs_batch_dimensions":["0"]}}}'),
    ],
    ids=["dot", "convolution", "cublas"],
)  # fmt: skip
def test_matrix_product(lhs: str, rhs: str, line: str) -> None:
    flops, matmul = _flops(f"{_parameters(lhs, rhs)}\n  ROOT %r = {line}")
    assert flops == matmul == 2 * B * M * N * K


def test_complex_numbers_take_four_products_and_their_sums() -> None:
    line = "c64[3,7] dot(%a, %b), lhs_contracting_dims={1}, rhs_contracting_dims={0}"
    found = _flops(f"{_parameters('c64[3,5]', 'c64[5,7]')}\n  ROOT %r = {line}")
    assert found == (8 * 3 * 5 * 7, 8 * 3 * 5 * 7)


def test_convolution_counts_only_positions_inside_the_input() -> None:
    # 3x3 on 5x4, padded to keep its size: 3*5-2 rows times 3*4-2 columns
    body = _parameters("f32[2,5,4,6]", "f32[3,3,3,8]") + (
        "\n  ROOT %r = f32[2,5,4,8] convolution(%a, %b), window={size=3x3 pad=1_1x1_1},"
        " dim_labels=b01f_01io->b01f, feature_group_count=2"
    )
    # batch 2, 8 outputs, 6 / 2 groups = 3 inputs each
    assert _flops(body) == (2 * 2 * 8 * 3 * 13 * 10,) * 2


@pytest.mark.parametrize("seed", range(300))
def test_valid_positions_against_counting(seed: int) -> None:
    def pick(k: int, low: int, high: int) -> int:
        return low + (seed * (2 * k + 31) // (k + 3) + k) % (high - low + 1)

    size, stride, pad, lhs, rhs = (
        pick(1, 1, 9), pick(2, 1, 4), pick(3, -3, 8), pick(4, 1, 5), pick(5, 1, 3),
    )  # fmt: skip
    inputs, outputs = pick(6, 1, 12), pick(7, 1, 14)
    expected = 0
    for o, k in itertools.product(range(outputs), range(size)):
        at = o * stride + k * rhs - pad
        expected += 0 <= at <= (inputs - 1) * lhs and at % lhs == 0
    dim = WindowDim(
        size=size, stride=stride, pad_low=pad, lhs_dilate=lhs, rhs_dilate=rhs
    )
    assert valid_positions(dim, inputs, outputs) == expected


def test_fusion_is_the_sum_of_its_body_nested_or_not() -> None:
    before = """
%inner (x: f32[4,6]) -> f32[4,6] {
  %x = f32[4,6] parameter(0)
  ROOT %e = f32[4,6] exponential(%x)
}
%outer (p: f32[4,6], q: f32[6,3]) -> f32[4,3] {
  %p = f32[4,6] parameter(0)
  %q = f32[6,3] parameter(1)
  %f = f32[4,6] fusion(%p), kind=kLoop, calls=%inner
  ROOT %d = f32[4,3] dot(%f, %q), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}
"""
    body = _parameters("f32[4,6]", "f32[6,3]") + (
        "\n  ROOT %r = f32[4,3] fusion(%a, %b), kind=kCustom, calls=%outer"
    )
    assert _flops(body, before) == (24 + 2 * 4 * 6 * 3, 2 * 4 * 6 * 3)


@pytest.mark.parametrize(
    "line",
    [
        'f32[8] custom-call(%a), custom_call_target="my_kernel"',
        'f32[8] custom-call(%a), custom_call_target="__gpu$xla.gpu.triton"',
        "f32[8] frobnicate(%a)",
        "f32[8] frobnicate-start(%a)",
        "f32[8] fusion(%a), kind=kLoop, calls=%absent",
        "f32[8] convolution(%a, %a), dim_labels=bf_io->bf",
        "f32[8] send(%a, %a), channel_id=1",
    ],
)
def test_unknown_work_stops_the_reader(line: str) -> None:
    with pytest.raises(ValueError, match="%r = "):
        _flops(f"{_parameters('f32[8]')}\n  ROOT %r = {line}")


def test_kernel_that_the_caller_knows() -> None:
    text = """HloModule m
ENTRY %e (a: f32[8]) -> f32[8] {
  %a = f32[8] parameter(0)
  ROOT %r = f32[8] custom-call(%a), custom_call_target="x", metadata={op_name="f/mine"}
}
"""
    for key in ("x", "mine"):
        assert read_ledger(text, kernels={key: 99}).flops == 99
    with pytest.raises(ValueError, match="no known cost"):
        read_ledger(text, kernels={"other": 99})


def test_kernel_with_a_cost_estimate() -> None:
    line = (
        'f32[8] custom-call(%a), custom_call_target="tpu_custom_call", backend_config='
        '{"custom_call_config":{"cost_estimate":{"flops":"640","transcendentals":"8"}}}'
    )
    assert _flops(f"{_parameters('f32[8]')}\n  ROOT %r = {line}") == (648, 640)


@pytest.mark.parametrize(
    ("mask", "length", "scores"),
    [
        ("NO_MASK", 1024, 1024 * 1024),
        # 8 rows of 128 x 128 tiles, of 1, 2, ... 8: 56 % of the square.
        ("CAUSAL", 1024, 36 * 128 * 128),
        ("PADDING_CAUSAL", 1000, 36 * 128 * 128),
        ("CAUSAL", 100, 100 * 100),
    ],
)
def test_attention_of_cudnn_counts_the_tiles_it_visits(
    mask: str, length: int, scores: int
) -> None:
    """As JAX 0.10 to 0.12 write `dot_product_attention(implementation="cudnn")`."""
    heads, queries = f"bf16[2,{length},4,64]", f"bf16[2,16,{length},64]{{3,1,2,0}}"
    sizes = f'["2","16","{length}","{length}"]'
    config = (
        '{"operation_queue_id":"0","cudnn_fmha_backend_config":{"fmha_scale":0.125,'
        f'"intermediate_tensor_shape":{{"element_type":"BF16","dimensions":{sizes}}},'
        f'"is_flash_attention":true,"mask_type":"{mask}","sliding_window_length":0}}}}'
    )
    body = f"""{_parameters(f"bf16[2,{length},16,64]", heads, heads)}
  %call = ({queries}, u8[0]{{0}}) custom-call(%a, %b, %c),\
 custom_call_target="__cudnn$fmhaSoftmax", backend_config={config}"""
    total, products = _flops(body)
    assert products == 2 * 16 * scores * 2 * 2 * 64
    assert total == products + 5 * 2 * 16 * scores
