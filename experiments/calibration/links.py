"""What one link of each benchmark is.

Links are tied together by next to nothing: a link's result goes into one element of
the next one's input (`_tie`), in place. Operands are different arrays, of which there
are enough that none is still in a cache when its turn comes again.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh

from experiments.calibration.chains import Array, Chain
from experiments.calibration.points import BYTES, WIDTH, Point, caches_of, distinct_of
from jaxllm.attention import decode_attention
from jaxllm.cache import KV
from jaxllm.norm_kernel import Mailbox, add_and_norm
from jaxllm.product_kernel import split_product
from jaxllm.quantized import Quantized, product, quantize
from jaxllm.token_kernel import token_attention
from sharding.residual import make_mailboxes

DTYPES = {
    "bf16": jnp.bfloat16,
    "fp32": jnp.float32,
    "fp8": jnp.float8_e4m3fn,
    "int8": jnp.int8,
    "int4": jnp.int4,
}
# XLA:GPU reduces small arrays with a kernel of its own unless it is told not to: the
# first option is of jaxlib 0.12, the other of 0.10; what is between may have both.
_NCCL = (
    {"xla_gpu_experimental_use_collective_kernels": ""},
    {"xla_gpu_unsupported_use_all_reduce_one_shot_kernel": False},
)
_OWN_KERNEL = "KERNEL_STRATEGY_TRITON"  # in compiled text
_BETWEEN = 8  # small kernels between two collectives; XLA makes graphs of five or more
_FAINT = 0.999  # a factor that leaves values where they are


def chain_of(point: Point, platform: str) -> Chain:
    """Returns the program of a point.

    Raises:
      ValueError: no such benchmark, kind of collective or implementation.
    """
    makers = {
        "kernel": _kernel, "call": _call, "copy": _copy, "read": _read,
        "vector": _vector, "matmul": _matmul, "scores": _scores,
        "split": _split, "add": _add, "token": _token, "attention": _attention,
        "collective": _collective, "apart": _collective,
    }  # fmt: skip
    made = makers[point.name](point, platform)
    looped = platform == "cpu" and point.name in ("kernel", "copy", "vector")
    return dataclasses.replace(made, links=point.links, looped=looped)


def _tie(x: jax.Array, y: jax.Array) -> jax.Array:
    """Returns `x` with one element of `y` in it: the next link waits for this one."""
    first = lax.slice(y, [n - 1 for n in y.shape], y.shape)
    first = first.reshape((1,) * x.ndim)
    if jnp.issubdtype(x.dtype, jnp.integer):
        first = first & 63
    return lax.dynamic_update_slice(x, first.astype(x.dtype), (0,) * x.ndim)


def _faint(x: jax.Array) -> jax.Array:
    return lax.optimization_barrier(x * _FAINT + 1)


def _kernel(point: Point, platform: str) -> Chain:
    return Chain(
        state=Array((256,), jnp.float32),
        link=lambda x, _: _faint(x),
        per_link={"hbm_bytes": 2 * 4 * 256},
        devices=int(point.at["devices"]),
    )


def _call(point: Point, platform: str) -> Chain:
    return Chain(
        state=Array((256,), jnp.float32),
        operands=Array((256,), jnp.float32),
        distinct=int(point.at["arguments"]),
        link=lambda x, w: x * _FAINT + w,
        per_link={},
        devices=int(point.at["devices"]),
    )


def _copy(point: Point, platform: str) -> Chain:
    size = int(point.at["bytes"])
    return Chain(
        state=Array((size // 8,), jnp.float32),
        link=lambda x, _: _faint(x),
        per_link={"hbm_bytes": size},
    )


def _read(point: Point, platform: str) -> Chain:
    """Rows are summed by one kernel; the maximum cannot be moved out of the sum."""
    size = int(point.at["bytes"])
    dtype = jnp.bfloat16 if platform != "cpu" else jnp.float32
    elements = size // jnp.dtype(dtype).itemsize
    columns = min(4096, max(elements // 128, 1))
    rows = elements // columns

    def link(x: jax.Array, w: jax.Array) -> jax.Array:
        above = jnp.maximum(w.astype(jnp.float32), x[:, None])
        return lax.optimization_barrier(jnp.sum(above, axis=1) / columns)

    return Chain(
        state=Array((rows,), jnp.float32),
        operands=Array((rows, columns), dtype),
        distinct=distinct_of(size, point.links),
        link=link,
        per_link={"hbm_bytes": size},
    )


_VECTOR_STEPS = 256  # of 2 FLOPs on each element


def _vector(point: Point, platform: str) -> Chain:
    flops = int(point.at["flops"])

    def link(x: jax.Array, _: Any) -> jax.Array:
        for _step in range(_VECTOR_STEPS):
            x = x * _FAINT + 1
        return lax.optimization_barrier(x)

    return Chain(
        state=Array((flops // (2 * _VECTOR_STEPS),), jnp.float32),
        link=link,
        per_link={"flops": flops},
    )


def _matmul(point: Point, platform: str) -> Chain:
    m, k, n = (int(point.at[name]) for name in "mkn")
    dtype, stored = DTYPES[str(point.at["dtype"])], DTYPES[str(point.at["weights"])]
    out = {jnp.int8: jnp.int32, jnp.float8_e4m3fn: jnp.bfloat16}.get(dtype, dtype)

    def link(x: jax.Array, w: Any) -> jax.Array:
        if isinstance(w, Quantized):
            return _tie(x, product(x[None], w))
        return _tie(x, lax.dot(x, w, preferred_element_type=out))

    weights: Any = Array((k, n), stored)
    if stored != dtype:
        form: Any = point.at["weights"]
        store = functools.partial(quantize, form=form)
        weights = jax.eval_shape(store, Array((k, n), dtype))
    weight_bytes = k * n * BYTES[str(point.at["weights"])]
    return Chain(
        state=Array((m, k), dtype),
        operands=weights,
        distinct=distinct_of(weight_bytes, point.links),
        link=link,
        per_link={"flops": 2 * m * n * k},
        slots=2,
    )


def _scores(point: Point, platform: str) -> Chain:
    b, m, k, n = (int(point.at[name]) for name in ("batch", "m", "k", "n"))

    def link(x: jax.Array, w: jax.Array) -> jax.Array:
        y = jnp.einsum("bmk,bnk->bmn", x, w, preferred_element_type=jnp.float32)
        return _tie(x, y)

    return Chain(
        state=Array((b, m, k), jnp.bfloat16),
        operands=Array((b, n, k), jnp.bfloat16),
        distinct=distinct_of(2 * b * n * k, point.links),
        link=link,
        per_link={"flops": 2 * b * m * n * k},
        slots=2,
    )


def _split(point: Point, platform: str) -> Chain:
    m, k, n = (int(point.at[name]) for name in "mkn")

    def link(x: jax.Array, w: jax.Array) -> jax.Array:
        return _tie(x, split_product(x, w))

    return Chain(
        state=Array((m, k), jnp.bfloat16),
        operands=Array((k, n), jnp.bfloat16),
        distinct=distinct_of(2 * k * n, point.links),
        link=link,
        per_link={"flops": 2 * m * n * k},
        slots=2,
    )


def _add(point: Point, platform: str) -> Chain:
    """What one writes is the stream that the next one reads."""
    rows, parts = int(point.at["rows"]), int(point.at["parts"])

    def link(x: jax.Array, operand: Any) -> jax.Array:
        part, scale = operand
        return add_and_norm(x, part, scale, 1e-5)[0]

    part = Array((parts, rows, WIDTH), jnp.float32)
    return Chain(
        state=Array((rows, WIDTH), jnp.bfloat16),
        operands=(part, Array((WIDTH,), jnp.bfloat16)),
        distinct=1,
        link=link,
        per_link={"hbm_bytes": int(point.at["bytes"])},
    )


def _token(point: Point, platform: str) -> Chain:
    """Caches are state, which the kernel writes to; each link takes the next one.

    All of the queries are touched to tie two links: a copy of one element would be no
    kernel, and starts later than one.
    """
    b, s, n, k, h = (int(point.at[name]) for name in "BSNKH")
    caches = caches_of(b, s, k, h)

    def link(state: Any, turns: Any) -> Any:
        qkv, (kv, *others) = state
        at = jnp.full((b,), s - 1, jnp.int32)
        cos, sin = turns
        out, kv = token_attention(qkv, cos, sin, kv, at)
        first = out.reshape(-1)[0].astype(qkv.dtype)
        return lax.optimization_barrier(qkv * _FAINT + first), [*others, kv]

    cache = KV(*[Array((b, k, s, h), jnp.bfloat16)] * 2)
    return Chain(
        state=(Array((1, b, k, n // k + 2, h), jnp.float32), [cache] * caches),
        operands=[Array((b, h // 2), jnp.float32)] * 2,
        distinct=1,
        link=link,
        per_link={"flops": int(point.at["flops"])},
        slots=3,
    )


def _attention(point: Point, platform: str) -> Chain:
    """Of a library the output of one is the queries of the next, and ties them."""
    b, t, s, n, k, h = (int(point.at[name]) for name in "BTSNKH")
    by = str(point.at["implementation"])
    dtype = jnp.bfloat16 if platform != "cpu" else jnp.float32
    cache_bytes = 2 * b * s * k * h * jnp.dtype(dtype).itemsize
    common: dict[str, Any] = dict(
        per_link={"flops": int(point.at["flops"])},
        distinct=distinct_of(cache_bytes, point.links) if t == 1 else 1,
    )
    cache = KV(*[Array((b, k, s, h), dtype)] * 2)
    if by == "einsum":

        def attend_plainly(q: jax.Array, kv: Any) -> jax.Array:
            at = jnp.full((b,), s - 1, jnp.int32)
            out = decode_attention(q, kv, at)
            return lax.optimization_barrier(out)

        state = Array((b, 1, k, n // k, h), dtype)
        return Chain(state=state, operands=cache, link=attend_plainly, **common)
    if by not in ("cudnn", "xla"):
        raise ValueError(f"no attention {by!r}; there are einsum, cudnn, xla")
    return Chain(
        state=Array((b, t, n, h), dtype),
        operands=KV(*[Array((b, s, k, h), dtype)] * 2),
        link=functools.partial(_library_attention, by=by, causal=t > 1),
        **common,
    )


def _library_attention(q: jax.Array, kv: Any, *, by: Any, causal: bool) -> jax.Array:
    lengths = None
    if by == "cudnn" and not causal:
        lengths = jnp.full(q.shape[:1], kv.k.shape[1], jnp.int32)
    out = jax.nn.dot_product_attention(
        q, kv.k, kv.v, is_causal=causal, implementation=by,
        query_seq_lengths=None if lengths is None else jnp.ones_like(lengths),
        key_value_seq_lengths=lengths,
    )  # fmt: skip
    return lax.optimization_barrier(out)


def _collective(point: Point, platform: str) -> Chain:
    """Ties every collective to the next with one small kernel, or with many."""
    kind, group = str(point.at["kind"]), int(point.at["group"])
    if point.at["by"] == "triton":
        return _own_all_reduce(point)
    dtype = jnp.bfloat16 if platform != "cpu" else jnp.float32
    elements = int(point.at["bytes"]) // jnp.dtype(dtype).itemsize
    if kind == "all-gather":  # its payload is the result
        elements //= group
    between = _BETWEEN if point.name == "apart" else 0
    ring = [(i, (i + 1) % group) for i in range(group)]
    kinds: dict[str, Callable[[jax.Array], jax.Array]] = {
        "all-gather": lambda x: lax.all_gather(x, "group", tiled=True),
        "reduce-scatter": lambda x: lax.psum_scatter(x, "group", tiled=True),
        "permute": lambda x: lax.ppermute(x, "group", ring),
    }
    common: dict[str, Any] = dict(
        per_link={"collectives": 1},
        devices=int(point.at["devices"]),
        group=group,
        slots=1 + between,
    )
    if point.at["by"] == "nccl":
        common |= dict(options=_NCCL, avoids=_OWN_KERNEL)

    def wait(y: jax.Array) -> jax.Array:
        for i in range(between):
            y = _faint(y if i else y[:256])
        return y

    if kind == "all-reduce":
        # It overwrites its operand, and of equal values it would be a product: one
        # element of the result is made different on each device.
        def reduce(state: Any, _: Any) -> Any:
            x, factor = state
            y = lax.psum(x, "group")
            first = wait(y)[:1] * factor + factor
            return lax.dynamic_update_slice(y, first, (0,)), factor

        state = Array((elements,), dtype), Array((1,), dtype)
        return Chain(state=state, link=reduce, **common)
    send = kinds[kind]
    return Chain(
        state=Array((elements,), dtype),
        link=lambda x, _: _tie(x, wait(send(x))),
        **common,
    )


def _own_all_reduce(point: Point) -> Chain:
    """Sums, adds and norms, as decode programs do: what is normed is summed next."""
    rows, group = int(point.at["bytes"]) // (2 * WIDTH), int(point.at["group"])
    devices = int(point.at["devices"])
    box = Mailbox.of(peers=group, rows=rows, width=WIDTH)

    def bind(mesh: Mesh) -> Callable[[Any, Any], Any]:
        addresses = make_mailboxes(box, mesh).addresses

        def link(state: Any, _: Any) -> Any:
            x, part, scale = state
            x, part = add_and_norm(
                x, part, scale, 1e-5,
                mailbox=box,
                me=lax.axis_index("group"),
                addresses=jnp.asarray(addresses)[lax.axis_index("other")],
                groups=f"[{devices // group},{group}]<=[{devices}]",
            )  # fmt: skip
            return x, part, scale

        return link

    stream = Array((rows, WIDTH), jnp.bfloat16)
    return Chain(
        state=(stream, stream, Array((WIDTH,), jnp.bfloat16)),
        link=lambda state, _: state,
        bind=bind,
        per_link={"collectives": 1},
        devices=devices,
        group=group,
    )
