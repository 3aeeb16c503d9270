"""Programs that leave the collectives to XLA: shardings in, collectives out."""

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh

from tests.foreign.program import (
    BF16,
    F32,
    I32,
    TPUS,
    Program,
    array,
    foreign,
    on,
    place,
)


@foreign(data=8)
def fsdp_forward(mesh: Mesh) -> Program:
    """Weights live in pieces and are gathered where they are used."""
    b, d, f = 1024, 256, 640

    def mlp(x, w_in, w_out):
        h = jax.nn.gelu(x @ place(mesh, w_in))
        return place(mesh, h @ place(mesh, w_out), "data")

    weight = d * f * 4
    return Program(
        function=mlp,
        arguments=(
            array(mesh, (b, d), "data"),
            array(mesh, (d, f), "data"),
            array(mesh, (f, d), None, "data"),
        ),
        # 2 products, 2 FLOPs a multiply-add, 1/8 of the rows.
        matmul_flops=2 * 2 * (b // 8) * d * f,
        outputs_bytes=b // 8 * d * 4,
        sends={("data", "all-gather"): (2, 2 * weight)},
        sends_on={
            "h100": {("data", "all-gather"): (1, 2 * weight)},  # combined
            **on(TPUS, {("data", "all-gather"): (2, weight)}),
        },
    )


@foreign(data=8)
def fsdp_step(mesh: Mesh) -> Program:
    """One step of gradient descent on an MLP whose weights live in pieces."""
    b, d, f = 1024, 256, 640

    def loss(weights, x, y):
        w_in, w_out = weights
        out = jax.nn.relu(x @ place(mesh, w_in)) @ place(mesh, w_out)
        return jnp.sum((out - y) ** 2)

    def step(weights, x, y):
        value, slopes = jax.value_and_grad(loss)(weights, x, y)
        slopes = (place(mesh, slopes[0], "data"), place(mesh, slopes[1], None, "data"))
        return value, jax.tree.map(lambda w, g: w - 0.01 * g, weights, slopes)

    weight = d * f * 4
    return Program(
        function=step,
        arguments=(
            (array(mesh, (d, f), "data"), array(mesh, (f, d), None, "data")),
            array(mesh, (b, d), "data"),
            array(mesh, (b, d), "data"),
        ),
        donated=(0,),
        # 2 forward, 2 for the weights' gradients, 1 for the hidden gradient.
        matmul_flops=5 * 2 * (b // 8) * d * f,
        outputs_bytes=4 + 2 * weight // 8,
        sends={
            ("data", "all-gather"): (2, 2 * weight),
            ("data", "reduce-scatter"): (2, 2 * weight),
            ("data", "all-reduce"): (1, 4),  # the loss
        },
        sends_on={
            # Sums everything everywhere, then cuts.
            "cpu": {
                ("data", "all-gather"): (2, 2 * weight),
                ("data", "all-reduce"): (1, 2 * weight + 4),
            },
            "h100": {  # combined
                ("data", "all-gather"): (1, 2 * weight),
                ("data", "reduce-scatter"): (1, 2 * weight),
                ("data", "all-reduce"): (1, 4),
            },
            "v5e": {  # both gradients in one fusion of all-reduce and slices
                ("data", "all-gather"): (2, weight),
                ("data", "reduce-scatter"): (1, 2 * weight),
                ("data", "all-reduce"): (1, 4),
            },
            "v5p": {
                ("data", "all-gather"): (2, weight),
                ("data", "all-reduce"): (1, 2 * weight + 4),
            },
        },
    )


@foreign(data=2, tensor=4)
def sequence_parallel(mesh: Mesh) -> Program:
    """LayerNorm on a slice of the tokens, products on a slice of the width."""
    b, t, d, f = 6, 128, 256, 768

    def block(x, scale, w_in, w_out):
        mean = jnp.mean(x, axis=-1, keepdims=True)
        spread = jnp.mean((x - mean) ** 2, axis=-1, keepdims=True)
        h = (x - mean) * lax.rsqrt(spread + 1e-5) * scale
        h = place(mesh, h, "data", "tensor")
        h = place(mesh, h, "data")  # all tokens
        h = place(mesh, jax.nn.relu(h @ w_in), "data", None, "tensor")
        return x + place(mesh, h @ w_out, "data", "tensor")

    tokens = b // 2 * t  # of one data group
    return Program(
        function=block,
        arguments=(
            array(mesh, (b, t, d), "data", "tensor"),
            array(mesh, (1, 1, d)),
            array(mesh, (d, f), None, "tensor"),
            array(mesh, (f, d), "tensor"),
        ),
        matmul_flops=2 * 2 * tokens * d * (f // 4),
        outputs_bytes=tokens // 4 * d * 4,
        sends={
            ("tensor", "all-gather"): (1, tokens * d * 4),
            ("tensor", "reduce-scatter"): (1, tokens * d * 4),
        },
        sends_on={
            "cpu": {  # knows no reduce-scatter of its own
                ("tensor", "all-gather"): (1, tokens * d * 4),
                ("tensor", "all-reduce"): (1, tokens * d * 4),
            },
            **on(
                TPUS,
                {
                    ("tensor", "all-gather"): (1, tokens * d * 2),
                    ("tensor", "reduce-scatter"): (1, tokens * d * 4),
                },
            ),
        },
    )


@foreign(data=2, tensor=4)
def embedding_lookup(mesh: Mesh) -> Program:
    """Each device holds some rows of the table; a sum puts the answers together."""
    v, d, b, t = 4096, 192, 16, 24

    def lookup(table, ids):
        return place(mesh, jnp.take(table, ids, axis=0, mode="clip"), "data")

    found = b // 2 * t * d * 4
    return Program(
        function=lookup,
        arguments=(
            array(mesh, (v, d), "tensor"),
            array(mesh, (b, t), "data", dtype=I32),
        ),
        matmul_flops=0,
        outputs_bytes=found,
        sends={("tensor", "all-reduce"): (1, found)},
        # Rows that are asked for, once; on TPU the table is first turned row-major.
        least_hbm_bytes=found,
        most_hbm_bytes=8 * found + 2 * v // 4 * d * 4,
    )


@foreign(data=8)
def adam_step(mesh: Mesh) -> Program:
    """Weights on every device, each sees some of the data: one mean of gradients."""
    b, d, f = 512, 192, 320

    def loss(params, x, y):
        h = jnp.tanh(x @ params["w_in"] + params["bias"])
        return jnp.mean((h @ params["w_out"] - y) ** 2)

    def step(params, first, second, count, x, y):
        value, slopes = jax.value_and_grad(loss)(params, x, y)
        mix = lambda rate: lambda m, g: rate * m + (1 - rate) * g
        first = jax.tree.map(mix(0.9), first, slopes)
        second = jax.tree.map(mix(0.999), second, jax.tree.map(lambda g: g * g, slopes))
        rate = 1e-3 * jnp.sqrt(1 - 0.999**count) / (1 - 0.9**count)
        params = jax.tree.map(
            lambda p, m, v: p - rate * m / (jnp.sqrt(v) + 1e-8), params, first, second
        )
        return value, params, first, second

    def params():
        return {
            "w_in": array(mesh, (d, f)),
            "bias": array(mesh, (1, f)),
            "w_out": array(mesh, (f, d)),
        }

    size = 4 * (2 * d * f + f)
    return Program(
        function=step,
        arguments=(
            params(),
            params(),
            params(),
            array(mesh, ()),
            array(mesh, (b, d), "data"),
            array(mesh, (b, d), "data"),
        ),
        donated=(0, 1, 2),
        matmul_flops=5 * 2 * (b // 8) * d * f,
        outputs_bytes=4 + 3 * size,
        # Three gradients and the loss, summed together by all these compilers.
        sends={("data", "all-reduce"): (1, size + 4)},
    )


@foreign(data=8)
def segment_sum(mesh: Mesh) -> Program:
    """Rows are added up by their label, on each device and then over all of them."""
    rows, width, segments = 4096, 48, 96

    def run(values, labels):
        total = jax.ops.segment_sum(values, labels, num_segments=segments)
        return place(mesh, total)

    out = segments * width * 4
    return Program(
        function=run,
        arguments=(
            array(mesh, (rows, width), "data"),
            array(mesh, (rows,), "data", dtype=I32),
        ),
        matmul_flops=0,
        outputs_bytes=out,
        sends={("data", "all-reduce"): (1, out)},
        flops=(rows // 8 * width, 4 * rows // 8 * width),
    )


@foreign(data=2, tensor=4)
def int8_dot(mesh: Mesh) -> Program:
    """Products of bytes, summed as 32-bit integers, then scaled."""
    b, d, f = 64, 1024, 384

    def run(x, w, scale):
        dot = jnp.einsum("bd,df->bf", x, w, preferred_element_type=I32)
        return place(mesh, dot.astype(F32), "data") * scale

    out = b // 2 * f * 4
    return Program(
        function=run,
        arguments=(
            array(mesh, (b, d), "data", "tensor", dtype=jnp.int8),
            array(mesh, (d, f), "tensor", dtype=jnp.int8),
            array(mesh, (1, f)),
        ),
        matmul_flops=2 * (b // 2) * (d // 4) * f,
        outputs_bytes=out,
        sends={("tensor", "all-reduce"): (1, out)},
    )


@foreign(data=2, tensor=4)
def fp8_dot(mesh: Mesh) -> Program:
    """Scaled 8-bit floats; chips without them convert first."""
    b, d, f = 64, 1024, 384

    def run(x, w, x_scale, w_scale):
        wide = lambda a, scale: a.astype(BF16) * scale.astype(BF16)
        out = jnp.einsum("bd,df->bf", wide(x, x_scale), wide(w, w_scale))
        return place(mesh, out, "data", "tensor")

    return Program(
        function=run,
        arguments=(
            array(mesh, (b, d), "data", dtype=jnp.float8_e4m3fn),
            array(mesh, (d, f), None, "tensor", dtype=jnp.float8_e4m3fn),
            array(mesh, (1, 1)),
            array(mesh, (1, 1)),
        ),
        matmul_flops=2 * (b // 2) * d * (f // 4),
        outputs_bytes=b // 2 * f // 4 * 2,
    )


@foreign(expert=8)
def ragged_experts(mesh: Mesh) -> Program:
    """Every device multiplies runs of rows by the weights of their group."""
    rows, d, f, groups = 512, 128, 256, 6

    def run(x, w, sizes):
        return lax.ragged_dot(x, w, sizes)

    return Program(
        function=run,
        arguments=(
            array(mesh, (rows, d)),
            array(mesh, (groups, d, f), None, None, "expert"),
            array(mesh, (groups,), dtype=I32),
        ),
        # Each row meets one group's weights.
        matmul_flops=2 * rows * d * f // 8,
        # CPU and GPU multiply by the weights of all groups and mask.
        matmul_flops_on=on(("cpu", "h100"), groups * 2 * rows * d * f // 8),
        outputs_bytes=rows * f // 8 * 4,
    )


@foreign(data=4, tensor=2)
def windowed_matmul(mesh: Mesh) -> Program:
    """A gather feeding a product, which XLA may turn into a ring of permutes."""
    b, t, d, f = 4, 512, 256, 640

    def run(x, w):
        return place(mesh, jnp.einsum("btd,df->btf", x, w), "data", None, "tensor")

    gathered = b // 4 * t * d * 4
    return Program(
        function=run,
        arguments=(
            array(mesh, (b, t, d), "data", "tensor"),
            array(mesh, (d, f), None, "tensor"),
        ),
        matmul_flops=2 * (b // 4) * t * d * (f // 2),
        outputs_bytes=b // 4 * t * f // 2 * 4,
        sends={("tensor", "all-gather"): (1, gathered)},
        sends_on={
            # A loop of 2 turns whose first sends the other half on.
            "h100": {("tensor", "permute"): (1, gathered // 2)},
            "h100.jax0.10": {("tensor", "all-gather"): (1, gathered)},
            **on(TPUS, {("tensor", "all-gather"): (1, gathered // 2)}),
        },
        options={
            "h100": {
                "xla_gpu_threshold_for_windowed_einsum_mib": 0,
                "xla_gpu_operand_bytes_threshold_for_windowed_einsum": 0,
            },
        },
    )


@foreign(data=2, tensor=4)
def donated_update(mesh: Mesh) -> Program:
    """One slot of a donated buffer is written; the rest stays where it is."""
    slots, b, d = 512, 12, 256

    def run(buffer, row, position):
        return lax.dynamic_update_slice(buffer, row, (0, position, 0))

    row = b // 2 * d // 4 * 4
    return Program(
        function=run,
        arguments=(
            array(mesh, (b, slots, d), "data", None, "tensor"),
            array(mesh, (b, 1, d), "data", None, "tensor"),
            array(mesh, (), dtype=I32),
        ),
        donated=(0,),
        matmul_flops=0,
        outputs_bytes=slots * row,
        least_hbm_bytes=2 * row,
        most_hbm_bytes=4 * row + 64,
    )


@foreign(data=8)
def vmapped_products(mesh: Mesh) -> Program:
    """One small product for each example, batched by vmap."""
    n, m, k, p = 64, 24, 96, 40

    def run(x, w):
        return jax.vmap(lambda a, b: jnp.tanh(a @ b))(x, w)

    return Program(
        function=run,
        arguments=(array(mesh, (n, m, k), "data"), array(mesh, (n, k, p), "data")),
        matmul_flops=2 * (n // 8) * m * k * p,
        outputs_bytes=n // 8 * m * p * 4,
    )
