"""Where the memory of a node goes: closed forms, for every group in flight.

A device of a partition with t tensor devices and p stages holds 1 / (t p) of the
weights and, of every sequence in flight, 1 / (t p) of its keys and values. A pipeline
is only full with p groups in flight, and each stage holds the cache of all of them: so
a partition that uses every device of a node can hold as many sequences as any other.

Counted one group at a time, as the batch limits of arXiv:2603.05692 come out, a stage
seems to have room for p times as many.
"""

import dataclasses

from experiments.claims.printed import Case
from jaxllm import config as config_lib
from sharding.chips import Chip
from sharding.links import links_used
from sharding.partition import Partition

_BITS = {"int4": 4, "int8": 8, "fp8": 8, "bfloat16": 16, "float32": 32}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Account:
    """Bytes of one device, and the sequences that fit beside its weights.

    Attributes:
      partition: name.
      weights_bytes: of one device; without scales, embedding and head in 16 bits.
      sequence_bytes: keys and values of one sequence on one device.
      sequences: of one replica in flight, all of their cache counted.
      group: sequences of one of its groups: `sequences` / stages.
      group_alone: sequences of a group if no other group's cache is counted.
    """

    partition: str
    weights_bytes: float
    sequence_bytes: float
    sequences: int
    group: int
    group_alone: int


def account(case: Case, chip: Chip, partition: str) -> Account:
    """Returns what `partition` can hold of `case` on devices of `chip`.

        weights  (L x layer_params x bits / 8 + 2 x 2 D V) / (t p)
        sequence 2 L K H (input + output) x bits / 8 / (t p)

    Beyond t = K tensor devices every head of the cache stands on several. It leaves
    out scales, temporaries and what a device needs besides, some per cent; and stages
    that are not equally long.
    """
    config, split = config_lib.load(case.model), Partition.parse(partition)
    ways = split.stage * split.tensor
    table = config.embed_dim * config.vocab_size
    ends = 2 * table * (1 if config.tie_embeddings else 2)
    blocks = config.num_layers * config.layer_params * _BITS[case.weights] / 8
    heads = min(split.tensor, config.num_kv_heads) * split.stage
    positions = case.input_len + case.output_len
    sequence = config.cache_bytes(1, 1) * positions * _BITS[case.kv] / 8 / heads
    weights = (blocks + ends) / ways
    free = chip.per_device().hbm_bytes - weights
    sequences = max(0, int(free // sequence))
    return Account(
        partition=split.name,
        weights_bytes=weights,
        sequence_bytes=sequence,
        sequences=sequences,
        group=sequences // split.stage,
        group_alone=sequences,
    )


def ideal_ttft_s(
    case: Case,
    chip: Chip,
    tensor: int,
    batch_size: int,
    *,
    dtype: str,
    links: float = 1,
) -> float:
    """Returns TTFT of tensor parallelism if only products and all-reduces took time.

        2 (L x layer_params) B T + 2 L N H B T^2, at the peak for `dtype`, / t
        + 2 L all-reduces of B T D in 16 bits, 2 (t - 1) / t, over the links used

    It leaves out memory, latency and overlap: what a simulator of products would say.

    Args:
      case: model and prompt length.
      chip: published rates.
      tensor: t, devices that share each layer.
      batch_size: B, sequences.
      dtype: of the products.
      links: rate of every link, in times its own.
    """
    config, device = config_lib.load(case.model), chip.per_device()
    tokens = batch_size * case.input_len
    flops = 2 * config.num_layers * config.layer_params * tokens
    width = config.num_heads * config.head_dim
    flops += 2 * config.num_layers * width * tokens * case.input_len
    compute_s = flops / tensor / device.matmul_flops_per_s(dtype)
    if tensor == 1:
        return compute_s
    wire = 2 * config.num_layers * tokens * config.embed_dim * 2 * 2 * (tensor - 1)
    used = links_used("all-reduce", tensor, device) * device.link_bytes_per_s * links
    return compute_s + wire / tensor / used


def power_of_two(number: int) -> int:
    """Returns the largest power of two up to `number`; 0 if there is none.

    Example:
      >>> power_of_two(40), power_of_two(64), power_of_two(0)
      (32, 64, 0)
    """
    return 1 << (number.bit_length() - 1) if number > 0 else 0
