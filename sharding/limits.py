"""Closed forms: the FLOPs a program should have, and the least time physics allows.

Written from the shapes of the model and the partition alone, so they check what is
read from compiled programs, and say how far an estimate is from what could be.
"""

import dataclasses
from collections.abc import Mapping

import jax.numpy as jnp

from jaxllm.model import layer_bytes
from jaxllm.quantized import kv_row_bytes
from sharding.attention import KERNELS
from sharding.chips import Chip
from sharding.links import links_used
from sharding.program import Program


@dataclasses.dataclass(frozen=True, kw_only=True)
class Work:
    """What one device must do in one call, and cannot avoid.

    Attributes:
      flops: multiply-adds of matrix products, times two.
      hbm_bytes: weights and cache that must be read, as they are stored, with scales.
      wire_bytes: that must be sent, by mesh axis.
    """

    flops: float
    hbm_bytes: float
    wire_bytes: Mapping[str, float]


def closed_form_flops(program: Program) -> int:
    """Returns the FLOPs that one device executes in one call of `program`.

    With n tokens a tick, per layer and before splitting (letters as in
    `jaxllm.axes`):

        projections  2 n D H (2 N + 2 K)
        feed-forward 6 n D F
        attention    4 N H x scores, a prompt's scores being the block pairs that
                     its attention visits, a token's the whole cache

    times the ticks, times the layers of the longest stage, the last layer of a prompt
    perhaps for a position a sequence (`Program.last_layer`); then the head, 2 D V for
    each sequence. So it contains what a partition does on purpose beyond the model:
    key/value heads computed on several devices, layers of zeros that even out stages,
    and ticks in which a stage is idle. Norms, rotary, softmax and sampling are left
    out: under 1 % for the published models.
    """
    layout, partition, model = program.layout, program.partition, program.layout.model
    workload, stages = program.workload, partition.stage
    heads, embed = partition.ways("heads"), partition.ways("embed")
    rows = _rows(program)
    # Sequences whose attention this device computes, of those in `rows`.
    split = partition.ways("cache_batch") if "data" not in partition.manual_axes else 1
    d, h, n, k = model.embed_dim, model.head_dim, model.num_heads, model.num_kv_heads
    if program.phase == "prefill":
        tokens = rows * workload.input_len
        scores = KERNELS[program.attention].scores(workload.input_len)
        attention_ways = heads
    else:
        tokens = rows
        scores = layout.cache_len
        attention_ways = partition.ways("kv_heads") * partition.ways("cache_seq")
    projections = 2 * tokens * d * h * (2 * n + 2 * k) // (heads * embed)
    mlp = 6 * tokens * d * model.mlp_dim // (partition.ways("mlp") * embed)
    attention = 4 * n * h * scores * rows // (split * attention_ways)
    layers = layout.layers_per_stage * program.num_ticks
    unread = 0
    if program.last_layer == "last" and stages == 1:
        # Of T positions T - 1, in the last layer, of each micro-batch. Of several
        # stages only the last one has that layer; the others set the pace.
        length = workload.input_len
        out = 2 * tokens * d * h * n // (heads * embed)
        unread = (out + mlp) * (length - 1) // length
        unread += attention - 4 * n * h * length * rows // (split * attention_ways)
        unread *= program.num_ticks
    # A vocabulary split over stages is computed by all of them, for every sequence.
    head = 2 * layout.replica_batch * d * model.vocab_size
    head //= partition.ways("vocab") * embed
    if stages > 1 and program.phase == "decode":
        head = head * stages // (layout.groups if layout.groups > 1 else stages)
    return layers * (projections + mlp + attention) - unread + head


def _rows(program: Program) -> int:
    """Returns the sequences that a stage works on in one tick."""
    batch = program.layout.replica_batch
    if program.phase == "decode":
        return batch // program.layout.groups
    return batch // program.prefill_micro_batches


def work(program: Program) -> Work:
    """Returns the least that one device of `program`'s partition must do.

    Prefill: its share of the model's FLOPs with exact causal attention, all positions
    in all layers, as they are counted elsewhere (`Program.last_layer` does with 3 %
    less); every weight read once, the prompt's cache written once. Bubbles are left
    out: more micro-batches can make them arbitrarily small. Decode: its share of the
    FLOPs; a stage's weights once for every group in flight, which come at different
    times; the cache once, at its mean length.

    Sent: the residual stream, around every attention and feed-forward block over the
    tensor axis (all-reduce, 2 (t - 1) / t), and once a hop over the stage axis.
    Embedding rows, norms and sampling are left out, and so is the traffic of `two_d`
    between its axes.
    """
    blocks, head = _blocks_and_head(program)
    return Work(
        flops=blocks.flops + head.flops,
        hbm_bytes=blocks.hbm_bytes + head.hbm_bytes,
        wire_bytes=blocks.wire_bytes,
    )


def _blocks_and_head(program: Program) -> tuple[Work, Work]:
    """Returns `work`, told apart by where it is done."""
    partition, config = program.partition, program.config
    workload, itemsize = program.workload, jnp.dtype(program.dtype).itemsize
    batch, devices = workload.batch_size, partition.num_devices
    if program.phase == "decode":
        tokens, groups = batch, program.layout.groups
        seen = cached = workload.input_len + workload.output_len / 2
    else:
        tokens, groups, cached = batch * workload.input_len, 1, workload.input_len
        seen = workload.input_len * (workload.input_len + 1) / 2
    # Replicas hold the same weights; under two_d, the data axis splits them too.
    readings = groups * partition.data // partition.ways("embed") / devices
    layer = layer_bytes(config, program.dtype, program.weights)
    row = kv_row_bytes(program.kv, program.dtype, config.head_dim)
    cache = 2 * config.num_layers * config.num_kv_heads * row * batch
    matmul = config.layer_params - 2 * config.embed_dim
    attention = 4 * config.num_heads * config.head_dim * batch * seen
    table = config.embed_dim * config.vocab_size
    stream = tokens * config.embed_dim * itemsize / partition.data
    wire: dict[str, float] = {}
    if partition.tensor > 1 and partition.ways("heads") == partition.tensor:
        t = partition.tensor
        wire["tensor"] = 2 * config.num_layers / partition.stage * stream
        wire["tensor"] *= 2 * (t - 1) / t
    if partition.stage > 1:
        wire["stage"] = stream
    blocks = Work(
        flops=config.num_layers * (2 * tokens * matmul + attention) / devices,
        hbm_bytes=config.num_layers * layer * readings + cache * cached / devices,
        wire_bytes=wire,
    )
    head = Work(
        flops=2 * batch * table / devices,
        hbm_bytes=table * itemsize * readings,
        wire_bytes={},
    )
    return blocks, head


def limit_s(program: Program, chip: Chip) -> float:
    """Returns the least time of one call: the slowest resource, all others hidden.

        T = max(flops / flops_per_s, hbm_bytes / hbm_bytes_per_s,
                wire_bytes / (links x link_bytes_per_s))

    A decoded token passes all stages in turn: with fewer groups in flight than
    stages, what the blocks must do counts stages / groups times.

    Args:
      program: what is run.
      chip: published rates of a whole chip.
    """
    blocks, head = _blocks_and_head(program)
    device, sizes = chip.per_device(), program.partition.axes
    serial = 1.0
    if program.phase == "decode":
        serial = program.num_ticks / program.layout.groups
    kinds = {"tensor": "all-reduce", "stage": "permute"}
    links = [
        serial
        * sent
        / (links_used(kinds[axis], sizes[axis], device) * device.link_bytes_per_s)
        for axis, sent in blocks.wire_bytes.items()
    ]
    flops = serial * blocks.flops + head.flops
    hbm_bytes = serial * blocks.hbm_bytes + head.hbm_bytes
    return max(
        flops / device.matmul_flops_per_s(program.dtype),
        hbm_bytes / device.hbm_bytes_per_s,
        *links,
    )
