"""Programs with control flow: loops of known and unknown length, branches, remat."""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh

from tests.foreign.program import I32, P, Program, array, foreign


@foreign(data=8)
def scan_in_scan(mesh: Mesh) -> Program:
    """Gradient accumulation: layers within micro-batches, one sum at the end."""
    micro, layers, b, d = 5, 3, 128, 192

    def run(x, w):
        def one(total, x):
            def layer(h, w):
                return jnp.tanh(h @ w), None

            h, _ = lax.scan(layer, x, w)
            return total + jnp.sum(h, axis=0), None

        total, _ = lax.scan(one, jnp.zeros((d,)), x)
        return total

    return Program(
        function=run,
        arguments=(
            array(mesh, (micro, b, d), None, "data"),
            array(mesh, (layers, d, d)),
        ),
        matmul_flops=micro * layers * 2 * (b // 8) * d * d,
        outputs_bytes=d * 4,
        sends={("data", "all-reduce"): (1, d * 4)},
        # Does not move the sum behind the loop.
        sends_on={"cpu": {("data", "all-reduce"): (micro, micro * d * 4)}},
        trip_counts=(micro, layers),
    )


@foreign(data=2, tensor=4)
def until_it_converges(mesh: Mesh) -> Program:
    """Power iteration of a block: how often it turns, only the matrix knows."""
    d, k = 512, 24

    def run(matrix, x):
        def unfinished(carry):
            _, change = carry
            return change > 1e-4

        def turn(carry):
            x, _ = carry
            y = matrix @ x
            y = y / jnp.sqrt(jnp.sum(y * y))
            return y, jnp.max(jnp.abs(y - x))

        return lax.while_loop(unfinished, turn, (x, jnp.float32(1)))

    return Program(
        function=run,
        arguments=(
            array(mesh, (d, d), None, "tensor"),
            array(mesh, (d, k), "tensor"),
        ),
        # One turn.
        matmul_flops=2 * d * (d // 4) * k,
        outputs_bytes=d // 4 * k * 4 + 4,
        # A sum of d x k partial products, one of their squares, the largest change.
        sends={
            ("tensor", "reduce-scatter"): (1, d * k * 4),
            ("tensor", "all-reduce"): (2, 2 * 4),
        },
        sends_on={"cpu": {("tensor", "all-reduce"): (3, d * k * 4 + 2 * 4)}},
        trip_counts=(None,),
        data_dependent=1,
    )


@foreign(data=8)
def odd_start_and_step(mesh: Mesh) -> Program:
    """From 7 to 60 by 9: 6 turns; and down from 100 by 3 while over 41: 20 turns."""
    m, n = 64, 160

    def run(x, w):
        def up(carry):
            i, x = carry
            return i + 9, jnp.tanh(x @ w)

        _, x = lax.while_loop(lambda c: c[0] < 60, up, (jnp.int32(7), x))

        def down(carry):
            i, x = carry
            return i - 3, jnp.sin(x @ w)

        _, x = lax.while_loop(lambda c: c[0] > 41, down, (jnp.int32(100), x))
        return x

    return Program(
        function=run,
        arguments=(array(mesh, (m, n), "data"), array(mesh, (n, n))),
        matmul_flops=(6 + 20) * 2 * (m // 8) * n * n,
        outputs_bytes=m // 8 * n * 4,
        trip_counts=(6, 20),
    )


@foreign(data=2, tensor=4)
def branches(mesh: Mesh) -> Program:
    """A cond whose one branch multiplies and sums, and a switch among three."""
    b, d, f = 64, 256, 384

    @functools.partial(
        jax.shard_map,
        mesh=mesh,
        in_specs=(P(), P(), P("data", "tensor"), P("tensor")),
        out_specs=P("data"),
        check_vma=False,
    )
    def run(flag, which, x, w):
        def product(x):
            return lax.psum(x @ w, "tensor")

        def nothing(x):
            return jnp.zeros((b // 2, f))

        y = lax.cond(flag > 0, product, nothing, x)
        once = lambda y: jnp.sin(y)
        twice = lambda y: jnp.sin(jnp.cos(y) * 2)
        with_product = lambda y: y + lax.pmax(y, "data")
        return lax.switch(which, (once, twice, with_product), y)

    out = b // 2 * f * 4
    return Program(
        function=run,
        arguments=(
            array(mesh, (), dtype=I32),
            array(mesh, (), dtype=I32),
            array(mesh, (b, d), "data", "tensor"),
            array(mesh, (d, f), "tensor"),
        ),
        # The costliest branches: the product, and the exchange.
        matmul_flops=2 * (b // 2) * (d // 4) * f,
        outputs_bytes=out,
        sends={("tensor", "all-reduce"): (1, out), ("data", "all-reduce"): (1, out)},
    )


@foreign(data=8)
def rematerialised(mesh: Mesh) -> Program:
    """The gradient of two layers whose insides are computed a second time."""
    b, d, f = 256, 128, 640

    def loss(weights, x):
        @jax.checkpoint
        def layer(x, weights):
            w_in, w_out = weights
            return jnp.tanh(jnp.sin(x @ w_in) @ w_out)

        for each in weights:
            x = layer(x, each)
        return jnp.sum(x * x)

    pair = (array(mesh, (d, f)), array(mesh, (f, d)))
    sizes = 2 * 2 * d * f * 4
    return Program(
        function=jax.grad(loss),
        arguments=((pair, pair), array(mesh, (b, d), "data")),
        # A layer: 2 forward, 2 again, 2 for its weights, 2 for its inputs; the first
        # layer needs no gradient of its input.
        matmul_flops=(2 * 8 - 1) * 2 * (b // 8) * d * f,
        # Older XLA:CPU finds that it has computed this before: 2 forward, not 4.
        matmul_flops_on={"cpu.jax0.10": (2 * 6 - 1) * 2 * (b // 8) * d * f},
        outputs_bytes=sizes,
        sends={("data", "all-reduce"): (1, sizes)},
    )


@foreign(data=8)
def blockwise_attention(mesh: Mesh) -> Program:
    """Blocks of keys in a scan, as flash attention does (Dao et al. 2022)."""
    b, t, h, block = 8, 512, 64, 128

    def run(q, k, v):
        def one(carry, kv):
            out, top, total = carry
            k, v = kv
            scores = jnp.einsum("bth,bsh->bts", q, k)
            best = jnp.maximum(top, jnp.max(scores, axis=-1))
            weights, keep = jnp.exp(scores - best[..., None]), jnp.exp(top - best)
            out = out * keep[..., None] + jnp.einsum("bts,bsh->bth", weights, v)
            return (out, best, total * keep + jnp.sum(weights, axis=-1)), None

        cut = lambda x: x.reshape(b, t // block, block, h).swapaxes(0, 1)
        top = jnp.full((b, t), -jnp.inf)
        start = (jnp.zeros_like(q), top, jnp.zeros_like(top))
        (out, _, total), _ = lax.scan(one, start, (cut(k), cut(v)))
        return out / total[..., None]

    x = array(mesh, (b, t, h), "data")
    return Program(
        function=run,
        arguments=(x, x, x),
        # Scores and mixing, t x t x h.
        matmul_flops=2 * 2 * (b // 8) * t * t * h,
        outputs_bytes=b // 8 * t * h * 4,
        trip_counts=(t // block,),
    )


@foreign(data=8)
def triangle_of_blocks(mesh: Mesh) -> Program:
    """The inner loop is as long as the outer counter says: 1 + 2 + ... + 7."""
    m, n, blocks = 32, 96, 7

    def run(x, w):
        def outer(i, x):
            return lax.fori_loop(0, i + 1, lambda _, x: jnp.tanh(x @ w), x)

        return lax.fori_loop(0, blocks, outer, x)

    return Program(
        function=run,
        arguments=(array(mesh, (m, n), "data"), array(mesh, (n, n))),
        matmul_flops=blocks * (blocks + 1) // 2 * 2 * (m // 8) * n * n,
        outputs_bytes=m // 8 * n * 4,
        trip_counts=(blocks, (blocks + 1) / 2),
    )


@foreign(data=8)
def length_from_an_argument(mesh: Mesh) -> Program:
    """A loop of unknown length around one of known length, with a sum inside."""
    m, n, steps = 64, 128, 4

    @functools.partial(
        jax.shard_map,
        mesh=mesh,
        in_specs=(P(), P("data"), P()),
        out_specs=P("data"),
        check_vma=False,
    )
    def run(length, x, w):
        def inner(_, x):
            return jnp.tanh(x @ w)

        def outer(_, x):
            return x + lax.psum(lax.fori_loop(0, steps, inner, x), "data")

        return lax.fori_loop(0, length, outer, x)

    piece = m // 8 * n * 4
    return Program(
        function=run,
        arguments=(
            array(mesh, (), dtype=I32),
            array(mesh, (m, n), "data"),
            array(mesh, (n, n)),
        ),
        matmul_flops=steps * 2 * (m // 8) * n * n,
        outputs_bytes=piece,
        sends={("data", "all-reduce"): (1, piece)},
        trip_counts=(None, steps),
        data_dependent=1,
    )
