"""Residual addition and norm as one GPU kernel, after a sum over devices if need be.

A Pallas kernel, compiled by Triton; one program a token. With peers, each program sends
its device's part of the sum straight into the memory of the others, waits for theirs
and adds what has come: an all-reduce of a few microseconds that needs no call between
two CUDA graphs. What has come lies in a `Mailbox`.

Every word is sent with a flag, in one store of eight bytes, which arrives whole: who
waits looks at the flags of the very words it needs, and nobody waits for a store to
have arrived before the next ("LL", NVIDIA's NCCL). It doubles what is sent, which is
little, and saves a journey over the links, which is long.

Why it is safe to write there: a program uses the two halves of its mailbox in turn. It
writes a half for the second time only after it has every peer's words of the call
between, and a peer sends those only after all of its earlier call is done. Flags count
calls, so that none is ever taken down.

JAX takes inline assembly for a pure function. Every piece therefore takes a number that
an earlier one gives (always 0, which the compiler cannot know), and repeating a piece
does no harm. The sum of such numbers over all threads is what joins the threads.
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

_LETTER = 8  # bytes: a word of two bfloat16 numbers, and its flag
_IN_FLIGHT = 16  # letters that a thread waits for at once
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
    def letters(self) -> int:
        """Offset in bytes of what peers send: [2, peers, rows, width / 2].

        Before it stand the calls so far, one number of four bytes a row.
        """
        return -(-self.rows * 4 // 128) * 128

    @property
    def row_bytes(self) -> int:
        """Of the letters of one row."""
        return self.width // 2 * _LETTER

    @property
    def num_bytes(self) -> int:
        return self.letters + 2 * self.peers * self.rows * self.row_bytes


def num_warps_of(width: int) -> int:
    """Returns the warps of a program: eight words, of two numbers, to a thread."""
    return min(max(width // (2 * 8 * 32), 1), 16)


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
    num_warps: int | None = None,
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
      num_warps: threads of a program, in warps of 32; None: `num_warps_of`.
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
    num_warps = num_warps or num_warps_of(width)
    kernel = functools.partial(
        _add_and_norm,
        eps=None if scale is None else eps,
        mailbox=mailbox,
        threads=32 * num_warps,
    )
    results = pl.pallas_call(
        kernel,
        grid=(batch,),
        in_specs=[spec for _, spec in inputs],
        out_specs=[spec for _, spec in outputs],
        out_shape=[shape for shape, _ in outputs],
        compiler_params=plgpu.CompilerParams(num_warps=num_warps, num_stages=1),
        name="all_reduce_add" if mailbox else "add",
        metadata=says,
        interpret=interpret,
    )(*(array for array, _ in inputs))
    return results[0], None if scale is None else results[1]


def _add_and_norm(
    *refs: Any, eps: float | None, mailbox: Mailbox | None, threads: int
) -> None:
    """One program: one token."""
    rest = list(refs)
    x_ref, part_ref = rest.pop(0), rest.pop(0)
    scale_ref: Any = None if eps is None else rest.pop(0)
    peers = [rest.pop(0), rest.pop(0)] if mailbox else []
    sum_ref = rest.pop(0)
    # A word that is sent holds a number of each half of the row.
    first = jnp.arange(x_ref.shape[0] // 2)
    halves = (first, first + x_ref.shape[0] // 2)
    # All that is not waited for is read before.
    stream = [plgpu.load(x_ref.at[at]) for at in halves]
    scales = (
        [] if scale_ref is None else [plgpu.load(scale_ref.at[at]) for at in halves]
    )
    sums = [_sum(part_ref, at) for at in halves]
    if mailbox:
        parts = [part.astype(x_ref.dtype) for part in sums]
        sums, done = _exchange(parts, mailbox, threads, *peers)
        rest[-1][...] = done
    total = []
    for at, old, add in zip(halves, stream, sums, strict=True):
        total.append(old + add.astype(old.dtype))
        plgpu.store(sum_ref.at[at], total[-1])
    if eps is None:
        return
    normed_ref = rest[0]
    wide = [half.astype(jnp.float32) for half in total]
    power = sum(jnp.sum(half * half) for half in wide) / x_ref.shape[0]
    factor = jax.lax.rsqrt(power + eps)
    for at, half, scale in zip(halves, wide, scales, strict=True):
        plgpu.store(normed_ref.at[at], (half * factor).astype(scale.dtype) * scale)


def _sum(part_ref: Any, at: Array) -> Array:
    """Returns the sum of all pieces at positions `at`, in float32."""
    total = jnp.zeros(at.shape, jnp.float32)
    for i in range(part_ref.shape[0]):
        total += plgpu.load(part_ref.at[i, at]).astype(jnp.float32)
    return total


def _exchange(
    parts: list[Array],
    mailbox: Mailbox,
    threads: int,
    me_ref: Any,
    addresses_ref: Any,
) -> tuple[list[Array], Array]:
    """Returns the sums over all peers, and 0 once this call is counted."""
    row, me, peers = pl.program_id(0), me_ref[0], mailbox.peers
    words = _pack(*parts)
    count = words.shape[0]
    together = max(1, min(_IN_FLIGHT, count // threads))

    def address(of: Any) -> tuple[Array, Array]:
        return (
            plgpu.load(addresses_ref.at[2 * of]),
            plgpu.load(addresses_ref.at[2 * of + 1]),
        )

    mine = address(me)
    calls = _asm("ld.volatile.global.u32 $0, [a0];", (*mine, row * 4), jnp.int32(0))
    call = jnp.sum(calls) + jnp.int32(1)
    half = (call & jnp.int32(1)) * peers

    # A thread holds words that follow each other, and writes one at a time: those that
    # all threads write at once are to lie side by side. Else a link takes six times as
    # long, as it did on two H100s.
    place_of = jnp.arange(count)
    place_of = place_of % together * (count // together) + place_of // together
    at = place_of * _LETTER

    def letter(sender: Any) -> Array:
        place = (half + sender) * mailbox.rows + row
        return mailbox.letters + place * mailbox.row_bytes + at

    # Each begins with its neighbour, so that no link is everybody's first.
    others = [(me + 1 + i) % peers for i in range(peers - 1)]
    zeros = jnp.zeros(words.shape, jnp.int32)
    for other in others:
        send = "st.volatile.global.v2.u32 [a0], {$4, $5}; mov.u32 $0, 0;"
        zeros += _asm(send, (*address(other), letter(me)), words, call)
    come = [
        _asm(_wait(together), (*mine, letter(other)), call + zeros, together=together)
        for other in others
    ]
    sums = [jnp.zeros(words.shape, jnp.float32)] * 2
    for i in range(peers):  # in one order, so that all peers have the same sum
        word = words
        for other, got in zip(others, come, strict=True):
            word = jnp.where(other == i, got, word)
        sums = [old + new for old, new in zip(sums, _unpack(word), strict=True)]
    read = sum((jnp.sum(got & zeros) for got in come), call)
    done = _asm(
        "st.volatile.global.u32 [a0], $4; mov.u32 $0, 0;", (*mine, row * 4), read
    )
    return sums, jnp.sum(done)


def _wait(together: int) -> str:
    """Returns code that waits for letters and gives their words.

    All are read before any flag is looked at; so long as one is not that of this call,
    all are read again.
    """
    each = range(together)
    flag = 4 * together  # of the first letter, as it should be
    reads = " ".join(f"ld.volatile.global.v2.u32 {{w{i}, f{i}}}, [a{i}];" for i in each)
    looks = " ".join(f"xor.b32 t, f{i}, ${flag + i}; or.b32 u, u, t;" for i in each)
    gives = " ".join(f"mov.u32 ${i}, w{i};" for i in each)
    names = ", ".join(f"w{i}, f{i}" for i in each)
    return (
        f".reg .u32 {names}; mov.u64 s, %clock64; WAIT: mov.u32 u, 0; {reads} {looks}"
        " setp.eq.u32 p, u, 0; @p bra COME; mov.u64 o, %clock64; sub.u64 o, o, s;"
        f" setp.gt.u64 p, o, {_PATIENCE}; @p trap; bra WAIT; COME: {gives}"
    )


def _asm(
    code: str, address: tuple[Any, Any, Any], *values: Any, together: int = 1
) -> Array:
    """Returns what `code` gives at addresses a0, a1, ...

    Args:
      code: PTX. Of `together` elements at once, $0, $1, ... are first the results,
        then the parts of their addresses, then the values, each of all elements.
      address: low + 2^32 high + offset.
      values: other inputs.
      together: elements that one piece of code is for.
    """
    inputs = (*address, *values)
    shape = jnp.broadcast_shapes(*map(jnp.shape, inputs), (1,))
    args = [jnp.broadcast_to(jnp.asarray(x).astype(jnp.int32), shape) for x in inputs]
    addresses = "".join(
        f" .reg .b64 a{i}; mov.b64 a{i}, {{${together + i}, ${2 * together + i}}};"
        f" cvt.u64.u32 o, ${3 * together + i}; add.s64 a{i}, a{i}, o;"
        for i in range(together)
    )
    constraints = ["=r"] * together + ["r"] * (len(args) * together)
    return plgpu.elementwise_inline_asm(
        f"{{ .reg .b64 o, s; .reg .pred p; .reg .u32 t, u;{addresses} {code} }}",
        args=args,
        constraints=",".join(constraints),
        pack=together,
        result_shape_dtypes=[jax.ShapeDtypeStruct(shape, jnp.int32)],
    )[0]


def _pack(low: Array, high: Array) -> Array:
    """Returns words of two bfloat16 numbers each."""
    first, second = (
        jax.lax.bitcast_convert_type(x, jnp.int16).astype(jnp.int32)
        for x in (low, high)
    )
    return (first & jnp.int32(0xFFFF)) | (second << 16)


def _unpack(words: Array) -> tuple[Array, Array]:
    """Returns the two numbers of each word, in float32."""
    wide = functools.partial(jax.lax.bitcast_convert_type, new_dtype=jnp.float32)
    return wide(words << 16), wide(words & jnp.int32(-65536))
