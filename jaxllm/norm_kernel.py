"""Residual addition and norm as one GPU kernel, after a sum over devices if need be.

A Pallas kernel, compiled by Triton; one program a token. With peers, each program sends
its device's part of the sum straight into the memory of the others, waits for theirs
and adds what has come: an all-reduce that needs no call between two CUDA graphs, and no
pass of its own over what it sums. What has come lies in a `Mailbox`.

How words are sent is one of two protocols, as in NVIDIA's NCCL, which calls them "LL"
and "Simple":

letters  Every word goes with a flag, in one store of eight bytes, which arrives whole:
         who waits looks at the flags of the very words it needs, and nobody waits for a
         store to have arrived before the next. It doubles what is sent, and saves a
         journey over the links: for the few words of a decoded token.
rows     A row goes as it is, and a flag behind it once it has arrived. Many rows are on
         their way at once, so the longer journey is hidden: for prompts.

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
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float, Int

from jaxllm.triton import cost, num_bytes

Protocol = Literal["letters", "rows"]

_WORD = 4  # bytes: two bfloat16 numbers
_LETTER = 8  # a word, and its flag
_VECTOR = 4  # words of one store
_IN_FLIGHT = 16  # words that a thread sends or waits for at once
_PATIENCE = 40_000_000_000  # clock cycles, some 20 s; who still waits then stops

# Bytes of all rows. Above, two H100s take less for a sum in rows than in letters.
LETTERS_UP_TO = 2**19


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mailbox:
    """How the memory is cut into which the devices of one group write.

    Attributes:
      peers: devices of the group, this one included.
      rows: the most tokens of one call.
      width: numbers of a token, bfloat16.
      protocol: how words are sent.
    """

    peers: int
    rows: int
    width: int
    protocol: Protocol

    @classmethod
    def of(cls, *, peers: int, rows: int, width: int) -> "Mailbox":
        """Returns a mailbox with the protocol that suits its size."""
        few = rows * width * 2 <= LETTERS_UP_TO
        return cls(
            peers=peers, rows=rows, width=width, protocol="letters" if few else "rows"
        )

    @property
    def flags(self) -> int:
        """Offset in bytes of the flags of rows: [2, peers - 1, rows].

        Before it stand the calls so far, one number of four bytes a row. Letters bring
        their own flags.
        """
        return _aligned(self.rows * _WORD)

    @property
    def words(self) -> int:
        """Offset in bytes of what peers send: [2, peers - 1, rows, width / 2]."""
        flags = 0 if self.protocol == "letters" else 2 * (self.peers - 1) * self.rows
        return self.flags + _aligned(flags * _WORD)

    @property
    def row_bytes(self) -> int:
        """Of one row as it is sent."""
        return self.width // 2 * (_LETTER if self.protocol == "letters" else _WORD)

    @property
    def num_bytes(self) -> int:
        return self.words + 2 * (self.peers - 1) * self.rows * self.row_bytes


def _aligned(num_bytes: int) -> int:
    return -(-num_bytes // 128) * 128


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

    def address(of: Any) -> tuple[Array, Array]:
        return (
            plgpu.load(addresses_ref.at[2 * of]),
            plgpu.load(addresses_ref.at[2 * of + 1]),
        )

    mine = address(me)
    calls = _asm("ld.volatile.global.u32 $0, [a0];", (*mine, row * 4), jnp.int32(0))
    call = jnp.sum(calls) + jnp.int32(1)
    # Each begins with its neighbour, so that no link is everybody's first.
    others = [(me + 1 + i) % peers for i in range(peers - 1)]
    exchange = _letters if mailbox.protocol == "letters" else _rows
    come, zeros = exchange(
        words, mailbox, threads, row, call, mine, [address(other) for other in others]
    )
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


def _slots(mailbox: Mailbox, row: Array, call: Array) -> tuple[list[Any], list[Any]]:
    """Returns which row of its mailbox each peer's words go to, and mine in each's.

    Peers in the order of their distance: the i-th has i others between, so this device
    is the last but i of what it has.
    """
    half = (call & jnp.int32(1)) * (mailbox.peers - 1)
    places = [(half + i) * mailbox.rows + row for i in range(mailbox.peers - 1)]
    return places, places[::-1]


def _letters(
    words: Array,
    mailbox: Mailbox,
    threads: int,
    row: Array,
    call: Array,
    mine: tuple[Array, Array],
    others: list[tuple[Array, Array]],
) -> tuple[list[Array], Array]:
    """Sends words with their flags; returns what has come, and 0 once it is sent."""
    count = words.shape[0]
    together = max(1, min(_IN_FLIGHT, count // threads))
    # A thread holds words that follow each other, and writes one at a time: those that
    # all threads write at once are to lie side by side. Else a link takes six times as
    # long, as it did on two H100s.
    at = side_by_side(count, together, 1) * _LETTER
    places, in_theirs = _slots(mailbox, row, call)
    zeros = jnp.zeros(words.shape, jnp.int32)
    for other, place in zip(others, in_theirs, strict=True):
        send = "st.volatile.global.v2.u32 [a0], {$4, $5}; mov.u32 $0, 0;"
        offset = mailbox.words + place * mailbox.row_bytes + at
        zeros += _asm(send, (*other, offset), words, call)
    come = [
        _asm(
            _wait(together),
            (*mine, mailbox.words + place * mailbox.row_bytes + at),
            call + zeros,
            together=together,
        )
        for place in places
    ]
    return come, zeros


def _rows(
    words: Array,
    mailbox: Mailbox,
    threads: int,
    row: Array,
    call: Array,
    mine: tuple[Array, Array],
    others: list[tuple[Array, Array]],
) -> tuple[list[Array], Array]:
    """Sends a row, then a flag; returns what has come, and 0 once it is sent."""
    count = words.shape[0]
    together = min(_IN_FLIGHT, count // threads)
    vector = min(_VECTOR, together)
    at = side_by_side(count, together, vector) * _WORD
    places, in_theirs = _slots(mailbox, row, call)
    zeros = jnp.zeros(words.shape, jnp.int32)
    for other, place in zip(others, in_theirs, strict=True):
        offset = mailbox.words + place * mailbox.row_bytes + at
        send = _store(together, vector)
        zeros += _asm(send, (*other, offset), words, together=together)
    sent = jnp.sum(zeros)  # which waits for all threads
    for other, place in zip(others, in_theirs, strict=True):
        flag = (
            "mov.u32 t, %tid.x; setp.eq.u32 p, t, 0; @p fence.acq_rel.sys;"
            " @p st.relaxed.sys.global.u32 [a0], $4; mov.u32 $0, 0;"
        )
        offset = mailbox.flags + place * _WORD
        sent += jnp.sum(_asm(flag, (*other, offset), call + sent))
    come = []
    for place in places:
        here = _asm(_FLAGGED, (*mine, mailbox.flags + place * _WORD), call + sent)
        offset = mailbox.words + place * mailbox.row_bytes + at + jnp.sum(here)
        load = _load(together, vector)
        come.append(_asm(load, (*mine, offset), together=together))
    return come, zeros


def side_by_side(count: int, together: int, vector: int) -> Array:
    """Returns where each of `count` words is sent, of which a thread holds `together`.

    What all threads write at once, `vector` words each, lies side by side.
    """
    word = jnp.arange(count)
    thread, turn = word // together, word % together // vector
    return (turn * (count // together) + thread) * vector + word % vector


def _store(together: int, vector: int) -> str:
    """Returns code that writes words, `vector` at once, and gives zeros."""
    value = 4 * together  # of the first word
    stores = " ".join(
        f"st.global{_width(vector)} [a{i}], {_names(value + i, vector)};"
        for i in range(0, together, vector)
    )
    return stores + " " + " ".join(f"mov.u32 ${i}, 0;" for i in range(together))


def _load(together: int, vector: int) -> str:
    """Returns code that reads words, `vector` at once."""
    return " ".join(
        f"ld.volatile.global{_width(vector)} {_names(i, vector)}, [a{i}];"
        for i in range(0, together, vector)
    )


def _width(vector: int) -> str:
    return f".v{vector}.u32" if vector > 1 else ".u32"


def _names(first: int, vector: int) -> str:
    names = ", ".join(f"${first + i}" for i in range(vector))
    return f"{{{names}}}" if vector > 1 else names


_LATE = (
    "mov.u64 o, %clock64; sub.u64 o, o, s;"
    f" setp.gt.u64 p, o, {_PATIENCE}; @p trap; bra WAIT;"
)
# Waits for a flag, and gives 0.
_FLAGGED = (
    "mov.u64 s, %clock64; WAIT: ld.acquire.sys.global.u32 u, [a0];"
    f" setp.eq.u32 p, u, $4; @p bra COME; {_LATE} COME: mov.u32 $0, 0;"
)


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
        f" setp.eq.u32 p, u, 0; @p bra COME; {_LATE} COME: {gives}"
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
