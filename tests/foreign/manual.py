"""Programs that say themselves what is sent: shard_map."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh

from tests.foreign.program import F32, I32, TPUS, P, Program, array, foreign, on


def _mapped(mesh: Mesh, in_specs: Any, out_specs: Any):
    return functools.partial(
        jax.shard_map,
        mesh=mesh,
        in_specs=in_specs,
        out_specs=out_specs,
        check_vma=False,
    )


@foreign(ring=8)
def ring_attention(mesh: Mesh) -> Program:
    """Keys and values go round; queries stay (Liu et al. 2023, arXiv:2310.01889)."""
    n, t, h = 4, 1024, 64
    local = t // 8

    @_mapped(mesh, P(None, "ring"), P(None, "ring"))
    def run(q, k, v):
        around = [(i, (i + 1) % 8) for i in range(8)]

        def turn(_, carry):
            out, top, total, k, v = carry
            scores = jnp.einsum("nth,nsh->nts", q, k)
            best = jnp.maximum(top, jnp.max(scores, axis=-1, keepdims=True))
            weights, keep = jnp.exp(scores - best), jnp.exp(top - best)
            out = out * keep + jnp.einsum("nts,nsh->nth", weights, v)
            total = total * keep + jnp.sum(weights, axis=-1, keepdims=True)
            k, v = (lax.ppermute(x, "ring", around) for x in (k, v))
            return out, best, total, k, v

        top = jnp.full((n, local, 1), -jnp.inf)
        start = (jnp.zeros_like(q), top, jnp.zeros_like(top), k, v)
        out, _, total, _, _ = lax.fori_loop(0, 8, turn, start)
        return out / total

    x = array(mesh, (n, t, h), None, "ring")
    piece = n * local * h * 4
    return Program(
        function=run,
        arguments=(x, x, x),
        # 8 turns of scores and mixing, each n x local x local x h.
        matmul_flops=8 * 2 * 2 * n * local * local * h,
        outputs_bytes=piece,
        sends={("ring", "permute"): (16, 16 * piece)},
        sends_on={
            "h100": {("ring", "permute"): (8, 16 * piece)},  # keys and values combined
            **on(TPUS, {("ring", "permute"): (16, 8 * piece)}),
        },
    )


@foreign(data=2, expert=4)
def mixture_of_experts(mesh: Mesh) -> Program:
    """Tokens go to the device of their expert and come back: two exchanges."""
    tokens, d, f = 768, 96, 256  # tokens of one device's slots: 4 experts x 192
    slots = 192

    both = P(("data", "expert"))

    @_mapped(mesh, (both, P("expert"), P("expert")), both)
    def run(x, w_in, w_out):
        scores = jnp.sum(x, axis=-1).reshape(4, slots)
        order = jnp.argsort(scores, axis=-1)
        parts = jnp.take_along_axis(x.reshape(4, slots, d), order[..., None], axis=1)
        there = lax.all_to_all(parts, "expert", 0, 0, tiled=True)
        hidden = jax.nn.relu(there.reshape(4 * slots, d) @ w_in[0])
        out = (hidden @ w_out[0]).reshape(4, slots, d)
        return lax.all_to_all(out, "expert", 0, 0, tiled=True).reshape(4 * slots, d)

    piece = 4 * slots * d * 4
    return Program(
        function=run,
        arguments=(
            array(mesh, (8 * tokens, d), ("data", "expert")),
            array(mesh, (4, d, f), "expert"),
            array(mesh, (4, f, d), "expert"),
        ),
        matmul_flops=2 * 2 * (4 * slots) * d * f,
        outputs_bytes=piece,
        sends={("expert", "all-to-all"): (2, 2 * piece)},
        sends_on=on(TPUS, {("expert", "all-to-all"): (2, piece // 2 + piece)}),
    )


@foreign(tensor=8)
def collective_matmul(mesh: Mesh) -> Program:
    """All-gather x product, written as a ring (Wang et al. 2023, ASPLOS)."""
    b, d, f = 512, 320, 768
    rows = b // 8

    @_mapped(mesh, (P("tensor"), P(None, "tensor")), P(None, "tensor"))
    def run(x, w):
        me = lax.axis_index("tensor")
        out = jnp.zeros((b, f // 8))
        for step in range(8):
            at = (me + step) % 8 * rows
            out = lax.dynamic_update_slice(out, x @ w, (at, jnp.zeros_like(at)))
            if step < 7:
                x = lax.ppermute(x, "tensor", [(i, (i - 1) % 8) for i in range(8)])
        return out

    return Program(
        function=run,
        arguments=(
            array(mesh, (b, d), "tensor"),
            array(mesh, (d, f), None, "tensor"),
        ),
        matmul_flops=2 * b * d * (f // 8),
        outputs_bytes=b * f // 8 * 4,
        sends={("tensor", "permute"): (7, 7 * rows * d * 4)},
        sends_on=on(TPUS, {("tensor", "permute"): (7, 7 * rows * d * 2)}),
    )


@foreign(data=2, tensor=4)
def scatter_and_gather(mesh: Mesh) -> Program:
    """psum_scatter and all_gather, tiled along the axis that is not the first."""
    m, n = 96, 512

    @_mapped(mesh, P("data", "tensor"), P("data", "tensor"))
    def run(x):
        part = lax.psum_scatter(x * x, "tensor", scatter_dimension=1, tiled=True)
        return lax.all_gather(jnp.sin(part), "tensor", axis=1, tiled=True)

    piece = m // 2 * n // 4 * 4
    return Program(
        function=run,
        arguments=(array(mesh, (m, n), "data", "tensor"),),
        matmul_flops=0,
        outputs_bytes=piece,
        sends={
            ("tensor", "reduce-scatter"): (1, piece),
            ("tensor", "all-gather"): (1, piece),
        },
        # So few columns are summed whole, and cut in another fusion.
        sends_on=on(
            TPUS,
            {
                ("tensor", "all-reduce"): (1, piece),
                ("tensor", "all-gather"): (1, piece),
            },
        ),
    )


@foreign(seq=8)
def heads_for_tokens(mesh: Mesh) -> Program:
    """Attention over all tokens with some heads each (Jacobs et al. 2023, Ulysses)."""
    t, n, h = 512, 16, 32

    @_mapped(mesh, P("seq"), P("seq"))
    def run(q, k, v):
        swap = lambda x: lax.all_to_all(x, "seq", 1, 0, tiled=True)
        q, k, v = swap(q), swap(k), swap(v)
        scores = jnp.einsum("tnh,snh->nts", q, k)
        mixed = jnp.einsum("nts,snh->tnh", jax.nn.softmax(scores), v)
        return lax.all_to_all(mixed, "seq", 0, 1, tiled=True)

    x = array(mesh, (t, n, h), "seq")
    piece = t // 8 * n * h * 4
    return Program(
        function=run,
        arguments=(x, x, x),
        matmul_flops=2 * 2 * (n // 8) * t * t * h,
        outputs_bytes=piece,
        sends={("seq", "all-to-all"): (4, 4 * piece)},
        sends_on=on(TPUS, {("seq", "all-to-all"): (4, 3 * piece // 2 + piece)}),
    )


@foreign(pod=2, data=2, tensor=2)
def mean_over_two_axes(mesh: Mesh) -> Program:
    """A mean over the first and last axis of three, and a largest over the middle."""
    m, n = 128, 192

    @_mapped(mesh, P("data"), P("data"))
    def run(x):
        mean = lax.pmean(x * 2, ("pod", "tensor"))
        return mean - lax.pmax(jnp.sin(mean), "data")

    piece = m // 2 * n * 4
    return Program(
        function=run,
        arguments=(array(mesh, (m, n), "data"),),
        matmul_flops=0,
        outputs_bytes=piece,
        sends={
            ("pod+tensor", "all-reduce"): (1, piece),
            ("data", "all-reduce"): (1, piece),
        },
    )


@foreign(stage=4, data=2)
def permute_pipeline(mesh: Mesh) -> Program:
    """Micro-batches walk through stages; what leaves the last one is summed out."""
    count, b, d = 5, 48, 160
    ticks = count + 4 - 1

    @_mapped(mesh, (P(None, "data"), P("stage")), P(None, "data"))
    def run(x, w):
        stage = lax.axis_index("stage")
        ahead = [(i, i + 1) for i in range(3)]

        def tick(carry, t):
            held, done = carry
            held = jnp.where(stage == 0, x[jnp.minimum(t, count - 1)], held)
            held = jnp.tanh(held @ w[0])
            done = done.at[jnp.maximum(t - 3, 0)].set(held)
            return (lax.ppermute(held, "stage", ahead), done), None

        start = (jnp.zeros_like(x[0]), jnp.zeros_like(x))
        (_, done), _ = lax.scan(tick, start, jnp.arange(ticks))
        return lax.psum(jnp.where(stage == 3, done, 0), "stage")

    one = b // 2 * d * 4
    return Program(
        function=run,
        arguments=(
            array(mesh, (count, b, d), None, "data"),
            array(mesh, (4, d, d), "stage"),
        ),
        matmul_flops=ticks * 2 * (b // 2) * d * d,
        outputs_bytes=count * one,
        sends={
            ("stage", "permute"): (ticks, ticks * one),
            ("stage", "all-reduce"): (1, count * one),
        },
        sends_on=on(
            TPUS,
            {
                ("stage", "permute"): (ticks, ticks * one // 2),
                ("stage", "all-reduce"): (1, count * one),
            },
        ),
    )


@foreign(data=2, tensor=4)
def from_one_to_all(mesh: Mesh) -> Program:
    """What device 0 of each group holds, on all of them."""
    m, n = 64, 288

    @_mapped(mesh, P("data"), P("data"))
    def run(x):
        varying = x + lax.axis_index("tensor").astype(F32)
        return lax.pbroadcast(varying, ("tensor",), 0)

    piece = m // 2 * n * 4
    return Program(
        function=run,
        arguments=(array(mesh, (m, n), "data"),),
        matmul_flops=0,
        outputs_bytes=piece,
        sends={("tensor", "broadcast"): (1, piece)},
        refused_by=("cpu", *TPUS),
    )


@foreign(data=2, tensor=4)
def varying_carry(mesh: Mesh) -> Program:
    """A carry is cast to vary over the axis that it is then summed along."""
    m, n, steps = 40, 144, 6

    @functools.partial(
        jax.shard_map, mesh=mesh, in_specs=P("data", "tensor"), out_specs=P("data")
    )
    def run(x):
        def add(carry, scale):
            return carry + jnp.sin(x * scale), None

        zero = jnp.zeros((m // 2, n // 4))
        start = lax.pcast(zero, ("data", "tensor"), to="varying")
        total, _ = lax.scan(add, start, jnp.arange(1.0, steps + 1))
        return lax.psum(total, "tensor")

    piece = m // 2 * n // 4 * 4
    return Program(
        function=run,
        arguments=(array(mesh, (m, n), "data", "tensor"),),
        matmul_flops=0,
        outputs_bytes=piece,
        sends={("tensor", "all-reduce"): (1, piece)},
    )


@foreign(expert=8)
def ragged_exchange(mesh: Mesh) -> Program:
    """Devices send each other runs of rows whose lengths only the data knows."""
    rows, d = 256, 128

    @_mapped(mesh, (P("expert"), P("expert"), P("expert")), P("expert"))
    def run(x, sizes, offsets):
        out = jnp.zeros_like(x)
        return lax.ragged_all_to_all(
            x, out, offsets, sizes, offsets, sizes, axis_name="expert"
        )

    piece = rows * d * 4
    return Program(
        function=run,
        arguments=(
            array(mesh, (8 * rows, d), "expert"),
            array(mesh, (64,), "expert", dtype=I32),
            array(mesh, (64,), "expert", dtype=I32),
        ),
        matmul_flops=0,
        outputs_bytes=piece,
        sends={("expert", "all-to-all"): (1, piece)},
        refused_by=("cpu",),
    )


@foreign(data=2, tensor=4)
def gathers_beside_products(mesh: Mesh) -> Program:
    """The next layer's weights are gathered while this layer multiplies."""
    layers, b, d = 6, 1024, 512

    @_mapped(mesh, (P("data"), P(None, "tensor")), P("data"))
    def run(x, w):
        whole = lax.all_gather(w[0], "tensor", tiled=True)
        for layer in range(layers):
            after = whole
            if layer + 1 < layers:
                after = lax.all_gather(w[layer + 1], "tensor", tiled=True)
            x, whole = jnp.tanh(x @ whole), after
        return x

    weight = d * d * 4
    return Program(
        function=run,
        arguments=(
            array(mesh, (b, d), "data"),
            array(mesh, (layers, d, d), None, "tensor"),
        ),
        matmul_flops=layers * 2 * (b // 2) * d * d,
        outputs_bytes=b // 2 * d * 4,
        sends={("tensor", "all-gather"): (layers, layers * weight)},
        sends_on={
            "h100": {("tensor", "all-gather"): (1, layers * weight)},  # combined
            **on(TPUS, {("tensor", "all-gather"): (layers, layers * weight // 2)}),
        },
    )


@foreign(data=8)
def same_operand_twice(mesh: Mesh) -> Program:
    """Several sums of the same axis, some of the same array: compilers combine them."""
    m, n = 48, 224

    @_mapped(mesh, (P("data"), P("data")), (P(), P(), P()))
    def run(x, y):
        return lax.psum((x, y, x), "data")

    x, y = m // 8 * n * 4, m // 8 * (n + 32) * 4
    return Program(
        function=run,
        arguments=(array(mesh, (m, n), "data"), array(mesh, (m, n + 32), "data")),
        matmul_flops=0,
        outputs_bytes=2 * x + y,
        sends={("data", "all-reduce"): (1, x + y)},
    )


@foreign(data=8)
def uneven_groups(mesh: Mesh) -> Program:
    """Sums over groups that are no axis of the mesh: their devices are spelled out."""
    m, n = 64, 136

    @_mapped(mesh, P("data"), P("data"))
    def run(x):
        groups = [[0, 3, 5, 6], [1, 2, 4, 7]]
        return lax.all_gather(x, "data", axis_index_groups=groups, tiled=True)

    piece = m // 8 * n * 4
    return Program(
        function=run,
        arguments=(array(mesh, (m, n), "data"),),
        matmul_flops=0,
        outputs_bytes=4 * piece,
        sends={("devices {0,3,5,6},{1,2,4,7}", "all-gather"): (1, 4 * piece)},
    )
