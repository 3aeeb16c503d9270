"""The least that a program can be predicted to take, before it is compiled.

`sharding.limits` says what physics allows any program. A plan asks what *this*
program, written as it is, cannot be predicted to be faster than; that is nearer, and
still needs no compiler. It counts what the form of the program fixes:

    products      closed-form FLOPs at the peak, idle ticks included, or each tick's
                  read of the stage's weights at the peak bandwidth
    cache         every position of the buffer read once a token
    collectives   those that the rule table puts around attention and feed-forward,
                  priced as a prediction prices them

On a GPU these follow each other on one stream, each waiting for the one before, so
they add up. Elsewhere a compiler may hide one behind another, and the longest counts.
What fusion decides (norms, softmax, copies) is left out.
"""

import dataclasses
import math
from collections.abc import Iterator

import jax.numpy as jnp

from sharding import limits, rates
from sharding.chips import Chip
from sharding.layout import Layout
from sharding.partition import Workload
from sharding.program import Program
from sharding.target import Target

_SERIAL = ("cuda", "rocm")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Holdings:
    """Bytes of one device that are there whatever the compiler does.

    Attributes:
      blocks_bytes: the layers of its stage.
      ends_bytes: embedding, head and last norm.
      kv_bytes: the cache of every sequence in flight.
    """

    blocks_bytes: int
    ends_bytes: int
    kv_bytes: int

    @property
    def total_bytes(self) -> int:
        return self.blocks_bytes + self.ends_bytes + self.kv_bytes


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sum:
    """One collective that a rule table cannot do without, of one device.

    Attributes:
      kind: as `sharding.links` calls it.
      group_size: devices that take part together.
      count: in one call.
      payload_bytes: of each.
      wire_bytes: that the device sends for each.
    """

    kind: str
    group_size: int
    count: int
    payload_bytes: float
    wire_bytes: float


# Parameters of a partition do not depend on the batch, and naming them takes long.
_weights: dict[str, tuple[int, int]] = {}


def holdings(layout: Layout) -> Holdings:
    """Returns what one device holds between calls."""
    unit = Workload(batch_size=1, input_len=1, output_len=1)
    plain = dataclasses.replace(
        layout, workload=unit, layers="scanned", ticks="scanned"
    )
    key = repr(plain)
    if key not in _weights:
        params = plain.named_params()
        _weights[key] = (
            layout.device_bytes(params.blocks),
            layout.device_bytes(params.ends),
        )
    blocks, ends = _weights[key]
    kv = layout.device_bytes(layout.named_state().cache)
    return Holdings(blocks_bytes=blocks, ends_bytes=ends, kv_bytes=kv)


def least_s(program: Program, target: Target, held: Holdings) -> float:
    """Returns a time that no prediction of one call of `program` is below.

    Never less than `limits.limit_s`.

    Args:
      program: as it would be compiled, see `sharding.choices`.
      target: what for.
      held: what one device holds of it.
    """
    chip = target.chip.per_device()
    flops_per_s = chip.matmul_flops_per_s(program.dtype)
    attention = _cache_flops(program) if program.phase == "decode" else 0
    products_s = (limits.closed_form_flops(program) - attention) / flops_per_s
    weights_s = program.num_ticks * held.blocks_bytes / chip.hbm_bytes_per_s
    cache_s = 0.0
    if program.phase == "decode":
        rounds = program.num_ticks / program.layout.groups
        cache_s = rounds * held.kv_bytes / chip.hbm_bytes_per_s
    attention_s = attention / flops_per_s
    if target.platform in _SERIAL:
        sums_s = math.fsum(_sum_s(one, chip) for one in sums(program))
        work_s = max(products_s, weights_s) + max(attention_s, cache_s) + sums_s
    else:
        work_s = max(products_s + attention_s, weights_s + cache_s)
    found_s = work_s + rates.call_overhead_s(chip)
    return max(found_s, limits.limit_s(program, target.chip))


def _sum_s(one: Sum, chip: Chip) -> float:
    each = one.payload_bytes, one.wire_bytes
    return one.count * rates.collective_s(chip, one.kind, one.group_size, *each)


def _rows(program: Program) -> int:
    """Returns the sequences that a stage works on in one tick."""
    cut = program.prefill_micro_batches
    return program.layout.replica_batch // (
        program.layout.groups if program.phase == "decode" else cut
    )


def _cache_flops(program: Program) -> int:
    """Returns the FLOPs of decode's attention in `limits.closed_form_flops`."""
    layout, partition, config = program.layout, program.partition, program.config
    manual = "data" in partition.manual_axes
    ways = partition.ways("kv_heads") * partition.ways("cache_seq")
    ways *= 1 if manual else partition.ways("cache_batch")
    scores = config.num_heads * config.head_dim * layout.cache_len * _rows(program)
    return layout.layers_per_stage * program.num_ticks * (4 * scores // ways)


def sums(program: Program) -> Iterator[Sum]:
    """Yields what a layer's rule table cannot do without, in all layers and ticks.

    Around each attention and feed-forward, of the residual stream over `tensor`: an
    all-reduce, or a reduce-scatter and an all-gather where it is split over positions.
    Where weights are split over their width as well, what is partial over that axis:
    query, key and value, and the hidden layer. Where decode's cache is split over
    positions, queries are gathered and results scattered.
    """
    partition, config, phase = program.partition, program.config, program.phase
    layers = program.layout.layers_per_stage * program.num_ticks
    item = jnp.dtype(program.dtype).itemsize
    positions = program.workload.input_len if phase == "prefill" else 1
    tokens = _rows(program) * positions
    wide = partition.ways("embed", phase)

    def one(kind: str, group_size: int, count: int, width: float) -> Sum:
        payload = tokens * width * item
        passes = 2 if kind == "all-reduce" else 1
        return Sum(
            kind=kind,
            group_size=group_size,
            count=count,
            payload_bytes=payload,
            wire_bytes=passes * payload * (group_size - 1) / group_size,
        )

    t = partition.ways("heads", phase)
    if t > 1:
        width = config.embed_dim / wide
        if partition.ways("residual_seq", phase) > 1:
            yield one("reduce-scatter", t, 2 * layers, width)
            yield one("all-gather", t, 2 * layers, width)
        else:
            yield one("all-reduce", t, 2 * layers, width)
    if wide > 1:
        heads = (config.num_heads + 2 * config.num_kv_heads) * config.head_dim
        yield one("reduce-scatter", wide, layers, heads / t)
        hidden = 2 * config.mlp_dim / partition.ways("mlp", phase)
        yield one("all-reduce", wide, layers, hidden)
    if (pieces := partition.ways("cache_seq", phase)) > 1 and phase == "decode":
        width = config.num_heads * config.head_dim
        yield one("all-gather", pieces, layers, width)
        yield one("reduce-scatter", pieces, layers, width)
