"""Programs of one device's work: convolutions, gathers, sorts, factorisations."""

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh

from tests.foreign.program import F32, I32, TPUS, Program, array, foreign, on


def _conv(x, w, dims, **options):
    options = {"window_strides": (1,) * (len(dims) - 2), "padding": "VALID", **options}
    spatial = dims[2:]
    numbers = lax.conv_dimension_numbers(
        x.shape, w.shape, (f"N{spatial}C", f"{spatial}IO", f"N{spatial}C")
    )
    return lax.conv_general_dilated(x, w, dimension_numbers=numbers, **options)


@foreign(data=8)
def convolution_1d(mesh: Mesh) -> Program:
    """Every output looks at 5 inputs; at the edges, at 3 and 4."""
    b, t, c, f, taps = 32, 100, 48, 80, 5

    def run(x, w):
        return _conv(x, w, "NCW", padding="SAME")

    # Of t x 5 positions 2 + 1 + 1 + 2 lie outside. TPU cuts t into 8 pieces of 13.
    inside = t * taps - 6
    return Program(
        function=run,
        arguments=(array(mesh, (b, t, c), "data"), array(mesh, (taps, c, f))),
        matmul_flops=2 * (b // 8) * inside * c * f,
        matmul_flops_on=on(TPUS, 2 * (b // 8) * (8 * 13 * taps) * c * f),
        outputs_bytes=b // 8 * t * f * 4,
    )


@foreign(data=8)
def convolution_strided(mesh: Mesh) -> Program:
    """2-D, windows of 5 x 3 that step by 2 and 3."""
    b, h, w, c, f = 16, 33, 31, 24, 40
    out_h, out_w = (h - 5) // 2 + 1, (w - 3) // 3 + 1

    def run(x, kernel):
        return _conv(x, kernel, "NCHW", window_strides=(2, 3))

    return Program(
        function=run,
        arguments=(array(mesh, (b, h, w, c), "data"), array(mesh, (5, 3, c, f))),
        matmul_flops=2 * (b // 8) * out_h * out_w * 5 * 3 * c * f,
        # TPU cuts each row into 8 pieces with 2 results each, of which 10 are kept.
        matmul_flops_on=on(TPUS, 2 * (b // 8) * out_h * 16 * 5 * 3 * c * f),
        outputs_bytes=b // 8 * out_h * out_w * f * 4,
    )


@foreign(data=8)
def convolution_dilated(mesh: Mesh) -> Program:
    """2-D, 3 x 3 taps that lie 2 and 4 apart."""
    b, h, w, c, f = 8, 40, 36, 16, 56
    out_h, out_w = h - 4, w - 8

    def run(x, kernel):
        return _conv(x, kernel, "NCHW", rhs_dilation=(2, 4))

    return Program(
        function=run,
        arguments=(array(mesh, (b, h, w, c), "data"), array(mesh, (3, 3, c, f))),
        matmul_flops=2 * (b // 8) * out_h * out_w * 9 * c * f,
        outputs_bytes=b // 8 * out_h * out_w * f * 4,
    )


@foreign(data=8)
def convolution_grouped(mesh: Mesh) -> Program:
    """4 groups of channels that do not see each other."""
    b, h, w, c, f, groups = 16, 20, 18, 64, 96, 4

    def run(x, kernel):
        return _conv(x, kernel, "NCHW", feature_group_count=groups)

    return Program(
        function=run,
        arguments=(
            array(mesh, (b, h, w, c), "data"),
            array(mesh, (3, 3, c // groups, f)),
        ),
        matmul_flops=2 * (b // 8) * (h - 2) * (w - 2) * 9 * (c // groups) * f,
        # Their partitioner gathers the input and convolves all of it everywhere.
        matmul_flops_on=on(
            ("cpu", "h100"), 2 * b * (h - 2) * (w - 2) * 9 * (c // groups) * f
        ),
        sends_on=on(("cpu", "h100"), {("data", "all-gather"): (1, b * h * w * c * 4)}),
        outputs_bytes=b // 8 * (h - 2) * (w - 2) * f * 4,
    )


@foreign(data=8)
def convolution_gradient(mesh: Mesh) -> Program:
    """Both gradients of a strided convolution: dilated and transposed ones."""
    b, h, w, c, f = 16, 21, 17, 24, 32
    out_h, out_w = (h - 3) // 2 + 1, (w - 3) // 2 + 1

    def run(x, kernel, slope):
        product = lambda x, k: _conv(x, k, "NCHW", window_strides=(2, 2))
        _, back = jax.vjp(product, x, kernel)
        return back(slope)

    weights = 9 * c * f * 4
    return Program(
        function=run,
        arguments=(
            array(mesh, (b, h, w, c), "data"),
            array(mesh, (3, 3, c, f)),
            array(mesh, (b, out_h, out_w, f), "data"),
        ),
        # Each multiply-add of the forward convolution once in each gradient.
        matmul_flops=2 * 2 * (b // 8) * out_h * out_w * 9 * c * f,
        outputs_bytes=b // 8 * h * w * c * 4 + weights,
        sends={("data", "all-reduce"): (1, weights)},
    )


@foreign(data=8)
def sparse_product(mesh: Mesh) -> Program:
    """A sparse matrix as (row, column, value): gather, scale, scatter-add."""
    nonzero, rows, columns, width = 8192, 512, 640, 32

    def run(row, column, value, dense):
        picked = dense[column] * value[:, None]
        total = jnp.zeros((rows, width)).at[row].add(picked)
        return lax.with_sharding_constraint(total, jax.NamedSharding(mesh, jax.P()))

    out = rows * width * 4
    return Program(
        function=run,
        arguments=(
            array(mesh, (nonzero,), "data", dtype=I32),
            array(mesh, (nonzero,), "data", dtype=I32),
            array(mesh, (nonzero,), "data"),
            array(mesh, (columns, width)),
        ),
        matmul_flops=0,
        outputs_bytes=out,
        sends={("data", "all-reduce"): (1, out)},
        # One multiplication and one addition for each nonzero and column.
        flops=(2 * nonzero // 8 * width, 6 * nonzero // 8 * width + 2 * rows * width),
    )


@foreign(data=8)
def sort_and_top_k(mesh: Mesh) -> Program:
    """Rows sorted with their positions, and the 12 largest of each."""
    b, n, k = 64, 1000, 12

    def run(x):
        order = jnp.argsort(x, axis=-1)
        values, where = lax.top_k(x, k)
        return order, values, where

    rows = b // 8
    return Program(
        function=run,
        arguments=(array(mesh, (b, n), "data"),),
        matmul_flops=0,
        outputs_bytes=rows * (n + 2 * k) * 4,
        # Its TopK call cannot be split.
        sends_on={
            "cpu": {("data", "all-gather"): (1, b * n * 4)},
            # Gathers the results instead.
            "h100.jax0.10": {("data", "all-gather"): (1, b * 2 * k * 4)},
        },
        flops=(rows * n * 10, 40 * rows * n * 10),  # n log2 n comparisons
    )


@foreign(data=8)
def factorisations(mesh: Mesh) -> Program:
    """Cholesky, then two triangular solves: LAPACK, cuSolver, or XLA's own."""
    b, n, m = 16, 96, 40

    def run(a, y):
        lower = jnp.linalg.cholesky(a, symmetrize_input=False)
        z = lax.linalg.triangular_solve(lower, y, left_side=True, lower=True)
        return lower, z

    return Program(
        function=run,
        arguments=(array(mesh, (b, n, n), "data"), array(mesh, (b, n, m), "data")),
        matmul_flops=0,
        # TPU multiplies by the inverse.
        matmul_flops_on=on(TPUS, 2 * (b // 8) * n * n * m),
        outputs_bytes=b // 8 * (n * n + n * m) * 4,
        # n^3 / 3, and n^2 for each right-hand side.
        flops=(b // 8 * (n**3 // 3 + n * n * m), 20 * b // 8 * (n**3 + n * n * m)),
    )


@foreign(data=8)
def random_numbers(mesh: Mesh) -> Program:
    """Dropout with a key of JAX's default generator, and XLA's own bits."""
    m, n = 256, 320

    def run(seed, x):
        keep = jax.random.bernoulli(jax.random.key(seed), 0.9, (m, n))
        keep = lax.with_sharding_constraint(
            keep, jax.NamedSharding(mesh, jax.P("data"))
        )
        state = jnp.stack([seed.astype(jnp.uint32)] * 4)
        _, bits = lax.rng_bit_generator(state, (n,), dtype=jnp.uint32)
        return jnp.where(keep, x / 0.9, 0), bits

    return Program(
        function=run,
        arguments=(array(mesh, (), dtype=I32), array(mesh, (m, n), "data")),
        matmul_flops=0,
        outputs_bytes=m // 8 * n * 4 + n * 4,
        # Threefry: 20 rounds of at least 3 operations for each pair of words.
        flops=(m // 8 * n * 30, m * n * 200),
    )


@foreign(data=8)
def fourier(mesh: Mesh) -> Program:
    """Filtering in frequency space: there, times, and back."""
    b, n = 64, 1024

    def run(x, weights):
        spectrum = jnp.fft.rfft(x, axis=-1)
        return jnp.fft.irfft(spectrum * weights.astype(jnp.complex64), n, axis=-1)

    rows = b // 8
    return Program(
        function=run,
        arguments=(
            array(mesh, (b, n), "data"),
            array(mesh, (1, n // 2 + 1)),
        ),
        matmul_flops=0,
        # TPU takes 1024 as 128 x 8: complex products as 3 real ones, there and back.
        matmul_flops_on=on(TPUS, 2 * 3 * 2 * rows * n * (128 + 8)),
        outputs_bytes=rows * n * 4,
        # Older ones gather every row, and every complex spectrum.
        sends_on=on(
            ("cpu.jax0.10", "h100.jax0.10"),
            {("data", "all-gather"): (2, b * n * 4 + b * (n // 2 + 1) * 8)},
        ),
        # 5 n log2 n, half for real numbers, there and back.
        flops=(5 * rows * n * 10, 2 * 3 * 2 * rows * n * 160),
    )


@foreign(data=8)
def windows_and_sums(mesh: Mesh) -> Program:
    """Pooling, a running sum and an associative scan."""
    b, h, w, c = 16, 24, 20, 32

    def run(x):
        pooled = lax.reduce_window(
            x, -jnp.inf, lax.max, (1, 3, 2, 1), (1, 3, 2, 1), "VALID"
        )
        running = jnp.cumsum(x, axis=1)
        product = lax.associative_scan(jnp.multiply, x, axis=2)
        return pooled, running, product

    rows = b // 8
    whole = rows * h * w * c
    return Program(
        function=run,
        arguments=(array(mesh, (b, h, w, c), "data"),),
        matmul_flops=0,
        outputs_bytes=(2 * whole + whole // 6) * 4,
        # 5 comparisons for 6 inputs, 1 addition, 1 product; at most the whole window.
        flops=(whole * 5 // 6 + 2 * whole, whole * (1 + h + 2 * 5)),
    )


@foreign(data=8)
def triangular_attention(mesh: Mesh) -> Program:
    """Attention under a lower triangle: the mask hides products, it saves none."""
    b, t, n, h = 8, 192, 4, 32

    def run(q, k, v):
        scores = jnp.einsum("btnh,bsnh->bnts", q, k) * h**-0.5
        scores = jnp.where(jnp.tril(jnp.ones((t, t), bool))[None, None], scores, -1e30)
        return jnp.einsum("bnts,bsnh->btnh", jax.nn.softmax(scores), v)

    x = array(mesh, (b, t, n, h), "data")
    return Program(
        function=run,
        arguments=(x, x, x),
        matmul_flops=2 * 2 * (b // 8) * n * t * t * h,
        outputs_bytes=b // 8 * t * n * h * 4,
    )


@foreign(data=8)
def eigenvalues(mesh: Mesh) -> Program:
    """A symmetric eigenproblem and a QR of each matrix."""
    b, n, m = 8, 32, 20

    def run(a, y):
        values = jnp.linalg.eigvalsh(a, symmetrize_input=False)
        return values, jnp.linalg.qr(y, mode="r")

    return Program(
        function=run,
        arguments=(array(mesh, (b, n, n), "data"), array(mesh, (b, n, m), "data")),
        matmul_flops=0,
        outputs_bytes=(n + m * m) * 4,
        # TPU's Jacobi sweeps take all matrices, as four quarters each.
        sends_on=on(TPUS, {("data", "all-gather"): (4, b * n * n * 4)}),
        flops=(n**3, 1 << 40),
    )


@foreign(data=8)
def host_callback(mesh: Mesh) -> Program:
    """NumPy on the host in the middle of a program."""
    m, n = 64, 176

    def run(x, w):
        y = jnp.tanh(x @ w)
        kind = jax.ShapeDtypeStruct((8,), F32)
        seen = jax.pure_callback(lambda y: y[:8, 0], kind, y)
        return y, seen

    return Program(
        function=run,
        arguments=(array(mesh, (m, n)), array(mesh, (n, n))),
        matmul_flops=2 * m * n * n,
        outputs_bytes=m * n * 4 + 8 * 4,
        sends={("data", "all-reduce"): (1, 8 * 4)},  # from the one that called
        refused_by=("h100",),  # a description has no host
    )
