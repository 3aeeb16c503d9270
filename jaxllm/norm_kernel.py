"""Residual addition and norm as one GPU kernel, after a sum over devices if need be.

A Pallas kernel, compiled by Triton; one program a token. With peers, each program sends
its device's part of the sum straight into the memory of the others, raises a flag
there, waits for theirs and adds what has come: an all-reduce of a few microseconds that
needs no call between two CUDA graphs. What has come lies in a `Mailbox`.

Why it is safe to write there: a program uses the two halves of its mailbox in turn. It
writes a half for the second time only after it has seen every peer's flag of the call
between, and a peer raises that flag only after all of its earlier call is done. Flags
count calls, so that none is ever taken down.

JAX takes inline assembly for a pure function. Every piece therefore takes a number that
an earlier one gives (always 0, which the compiler cannot know), and repeating a piece
does no harm. Sums of such numbers over all threads are what joins the threads.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float, Int

from jaxllm.triton import cost, num_bytes

_WORD = 4  # bytes; two bfloat16 numbers
_PATIENCE = 40_000_000_000  # clock cycles, some 20 s; who still waits then stops


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mailbox:
    """How the memory is cut into which the devices of one group write.

    Attributes:
      peers: devices of the group, this one included.
      rows: the most tokens of one call.
      width: numbers of a token, bfloat16.
    """

    peers: int
    rows: int
    width: int

    @property
    def counters(self) -> int:
        """Offset in bytes of the calls so far, one number a row."""
        return self.rows * self.peers * _WORD

    @property
    def letters(self) -> int:
        """Offset in bytes of what peers send: [2, peers, rows, width]."""
        return self.counters + -(-self.rows * _WORD // 128) * 128

    @property
    def num_bytes(self) -> int:
        return self.letters + 2 * self.peers * self.rows * self.width * 2


def refusal(*, width: int) -> str | None:
    """Returns why the kernel cannot be used, None if it can."""
    if width & (width - 1):
        return (
            f"residual kernel for {width} numbers a token: it takes a power of two. Use"
            " residual='plain', which has no such limit."
        )
    return None


def add_and_norm(
    x: Float[Array, "B D"],
    part: Float[Array, "B D"] | Float[Array, "P B D"],
    scale: Float[Array, " D"] | None,
    eps: float,
    *,
    mailbox: Mailbox | None = None,
    me: Int[Array, ""] | None = None,
    addresses: Int[Array, "n 2"] | None = None,
    groups: str = "",
    interpret: bool = False,
) -> tuple[Float[Array, "B D"], Float[Array, "B D"] | None]:
    """Returns the residual stream with `part` of all peers added, and it normed.

    Args:
      x: residual stream, the same on all peers.
      part: what this device adds to it; of several, their sum.
      scale: of the norm; None: there is none.
      eps: of the norm.
      mailbox: how peers reach each other; None: there are none.
      me: this device's place among the peers.
      addresses: of each peer's mailbox, low and high half.
      groups: of devices that sum, as HLO writes replica groups; for the ledger.
      interpret: run as ordinary operations, on any device; without peers only.

    Raises:
      ValueError: the shapes do not suit the kernel.
    """
    batch, width = x.shape
    if reason := refusal(width=width):
        raise ValueError(reason)
    if mailbox and x.dtype != jnp.bfloat16:
        raise ValueError(
            f"residual kernel between devices in {x.dtype.name}: it sends words of"
            " two bfloat16 numbers. Use residual='plain', which has no such limit."
        )
    if mailbox and (batch > mailbox.rows or width != mailbox.width):
        raise ValueError(
            f"{batch} tokens of {width} numbers for a mailbox of {mailbox.rows} of"
            f" {mailbox.width}. Make one that holds them."
        )
    row = pl.BlockSpec((None, width), lambda b: (b, 0))
    whole = functools.partial(pl.BlockSpec, index_map=lambda b: (0,))
    shape = jax.ShapeDtypeStruct(x.shape, x.dtype)
    pieces = part.reshape(-1, batch, width)
    each = pl.BlockSpec((pieces.shape[0], None, width), lambda b: (0, b, 0))
    inputs: list[tuple[Array, pl.BlockSpec]] = [(x, row), (pieces, each)]
    outputs: list[tuple[Any, pl.BlockSpec]] = [(shape, row)]
    says = cost(
        matmul_flops=0,
        other_flops=(0 if scale is None else 4) * x.size + pieces.size,
        hbm_bytes=num_bytes(x, pieces, x, *([] if scale is None else [x])),
    )
    if scale is not None:
        inputs.append((scale, whole((width,))))
        outputs.append((shape, row))
    if mailbox:
        assert me is not None
        assert addresses is not None
        inputs.append((me.reshape(1), whole((1,))))
        inputs.append((addresses.reshape(-1), whole((2 * mailbox.peers,))))
        count = jax.ShapeDtypeStruct((batch,), jnp.int32)
        outputs.append((count, pl.BlockSpec((None,), lambda b: (b,))))
        says |= {
            "collective": "all-reduce",
            "replica_groups": groups,
            "payload_bytes": str(num_bytes(x)),
        }
    kernel = functools.partial(
        _add_and_norm, eps=None if scale is None else eps, mailbox=mailbox
    )
    results = pl.pallas_call(
        kernel,
        grid=(batch,),
        in_specs=[spec for _, spec in inputs],
        out_specs=[spec for _, spec in outputs],
        out_shape=[shape for shape, _ in outputs],
        compiler_params=plgpu.CompilerParams(num_warps=8, num_stages=1),
        name="all_reduce_add" if mailbox else "add",
        metadata=says,
        interpret=interpret,
    )(*(array for array, _ in inputs))
    return results[0], None if scale is None else results[1]


def _add_and_norm(*refs: Any, eps: float | None, mailbox: Mailbox | None) -> None:
    """One program: one token."""
    rest = list(refs)
    x_ref, part_ref = rest.pop(0), rest.pop(0)
    scale_ref: Any = None if eps is None else rest.pop(0)
    peers = [rest.pop(0), rest.pop(0)] if mailbox else []
    sum_ref = rest.pop(0)
    # Even and odd numbers apart: a word that is sent holds one of each.
    even = 2 * jnp.arange(x_ref.shape[0] // 2)
    halves = (even, even + 1)
    sums = [_sum(part_ref, at) for at in halves]
    if mailbox:
        parts = [part.astype(x_ref.dtype) for part in sums]
        sums, done = _exchange(parts, mailbox, *peers)
        rest[-1][...] = done
    total = []
    for at, add in zip(halves, sums, strict=True):
        old = plgpu.load(x_ref.at[at])
        total.append(old + add.astype(old.dtype))
        plgpu.store(sum_ref.at[at], total[-1])
    if eps is None:
        return
    normed_ref = rest[0]
    wide = [half.astype(jnp.float32) for half in total]
    power = sum(jnp.sum(half * half) for half in wide) / x_ref.shape[0]
    factor = jax.lax.rsqrt(power + eps)
    for at, half in zip(halves, wide, strict=True):
        scale = plgpu.load(scale_ref.at[at])
        plgpu.store(normed_ref.at[at], (half * factor).astype(scale.dtype) * scale)


def _sum(part_ref: Any, at: Array) -> Array:
    """Returns the sum of all pieces at positions `at`, in float32."""
    total = jnp.zeros(at.shape, jnp.float32)
    for i in range(part_ref.shape[0]):
        total += plgpu.load(part_ref.at[i, at]).astype(jnp.float32)
    return total


def _exchange(
    parts: list[Array], mailbox: Mailbox, me_ref: Any, addresses_ref: Any
) -> tuple[list[Array], Array]:
    """Returns the sums over all peers, and 0 once this call is counted."""
    row, me, peers = pl.program_id(0), me_ref[0], mailbox.peers
    every = jnp.arange(pl.next_power_of_2(peers))
    peer = jnp.minimum(every, peers - 1)
    words = _pack(*parts)
    at = jnp.arange(words.shape[0]) * _WORD

    def address(of: Any) -> tuple[Array, Array]:
        return (
            plgpu.load(addresses_ref.at[2 * of]),
            plgpu.load(addresses_ref.at[2 * of + 1]),
        )

    mine = address(me)
    counter = mailbox.counters + row * _WORD
    calls = _asm("ld.volatile.global.u32 $0, [a];", *mine, counter, jnp.int32(0))
    call = jnp.sum(calls) + jnp.int32(1)
    half = call & jnp.int32(1)

    def letter(sender: Any) -> Array:
        place = (half * peers + sender) * mailbox.rows + row
        return mailbox.letters + place * mailbox.width * 2 + at

    sent = jnp.int32(0)
    for i in range(peers):
        # Each begins with its neighbour, so that no link is everybody's first.
        to = (me + 1 + i) % peers
        sent += jnp.sum(
            _asm(
                "st.relaxed.sys.global.u32 [a], $4; mov.u32 $0, 0;",
                *address(to),
                letter(me),
                words,
            )
        )
    # By the first warp, which holds all of so short an array.
    raised = jnp.sum(
        _asm(
            "mov.u32 t, %tid.x; setp.lt.u32 p, t, 32;"
            " @p st.release.sys.global.u32 [a], $4; mov.u32 $0, 0;",
            *address(peer),
            (row * peers + me) * _WORD,
            call + sent,
        )
    )
    come = jnp.int32(0)
    for i in range(peers):  # by every thread, each of which reads what has come
        wait = _asm(
            "mov.u64 s, %clock64;"
            " WAIT: ld.acquire.sys.global.u32 t, [a]; sub.u32 t, t, $4;"
            " setp.ge.s32 p, t, 0; @p bra COME;"
            " mov.u64 o, %clock64; sub.u64 o, o, s;"
            f" setp.gt.u64 p, o, {_PATIENCE}; @p trap; bra WAIT;"
            " COME: mov.u32 $0, 0;",
            *mine,
            (row * peers + i) * _WORD,
            call + raised,
        )
        come += jnp.sum(wait)
    sums = [jnp.zeros(words.shape, jnp.float32)] * 2
    for i in range(peers):  # in one order, so that all peers have the same sum
        got = _asm(
            "cvt.u64.u32 o, $4; add.s64 a, a, o; ld.relaxed.sys.global.u32 $0, [a];",
            *mine,
            letter(i),
            come,
        )
        sums = [old + new for old, new in zip(sums, _unpack(got), strict=True)]
    done = _asm(
        "st.volatile.global.u32 [a], $4; mov.u32 $0, 0;", *mine, counter, call + come
    )
    return sums, jnp.sum(done)


def _asm(code: str, low: Any, high: Any, offset: Any, value: Any) -> Array:
    """Returns what `code` gives at address `a`, low + 2^32 high + offset, with `$4`."""
    shape = jnp.broadcast_shapes(*map(jnp.shape, (low, high, offset, value)), (1,))
    args = [
        jnp.broadcast_to(jnp.asarray(x).astype(jnp.int32), shape)
        for x in (low, high, offset, value)
    ]
    return plgpu.elementwise_inline_asm(
        "{ .reg .b64 a, o, s; .reg .pred p; .reg .u32 t; mov.b64 a, {$1, $2};"
        f" cvt.u64.u32 o, $3; add.s64 a, a, o; {code} }}",
        args=args,
        constraints="=r,r,r,r,r",
        pack=1,
        result_shape_dtypes=[jax.ShapeDtypeStruct(shape, jnp.int32)],
    )[0]


def _pack(even: Array, odd: Array) -> Array:
    """Returns words of two bfloat16 numbers each."""
    low, high = (
        jax.lax.bitcast_convert_type(x, jnp.int16).astype(jnp.int32)
        for x in (even, odd)
    )
    return (low & jnp.int32(0xFFFF)) | (high << 16)


def _unpack(words: Array) -> tuple[Array, Array]:
    """Returns the two numbers of each word, in float32."""
    wide = functools.partial(jax.lax.bitcast_convert_type, new_dtype=jnp.float32)
    return wide(words << 16), wide(words & jnp.int32(-65536))
