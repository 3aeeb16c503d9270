"""Partition: how many ways each mesh axis splits the work, and by which rules.

A partition is written as its degrees, `tp4_pp2`, `dp2_tp4`, `pp8`; an absent one
is 1. `check` refuses what cannot work before anything is traced or compiled.
"""

import dataclasses
import difflib
import math
import re
from collections.abc import Sequence

from jaxllm.config import ModelConfig
from jaxllm.layers import MLP_PIECES, mlp_pieces
from sharding.rules import AxisRules, Name
from sharding.tensor import MEGATRON, RULES

_DEGREES = {"dp": "data", "tp": "tensor", "pp": "stage"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Workload:
    """What is asked of the model: a static batch of equal requests.

    Attributes:
      batch_size: B, sequences over all devices.
      input_len: prompt tokens of each.
      output_len: tokens generated for each, the first by prefill.

    Raises:
      ValueError: a size is not positive.
    """

    batch_size: int
    input_len: int
    output_len: int

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            if getattr(self, field.name) < 1:
                raise ValueError(
                    f"{field.name}={getattr(self, field.name)}: a workload needs at"
                    " least 1. Choose a positive number."
                )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Partition:
    """Degrees of the mesh axes, and the rule table inside a stage.

    Attributes:
      data: replicas (under `two_d`, the second axis that splits weights).
      stage: pipeline stages.
      tensor: devices that share each layer.
      rules: which dimension each axis splits.

    Example:
      >>> Partition.parse("pp2_tp4").name, Partition.parse("dp8").num_devices
      ('tp4_pp2', 8)
    """

    data: int = 1
    stage: int = 1
    tensor: int = 1
    rules: AxisRules = MEGATRON

    @classmethod
    def parse(cls, name: str, rules: str | AxisRules = MEGATRON) -> "Partition":
        """Returns the partition called `name`, such as `tp4_pp2`.

        Raises:
          ValueError: `name` is not degrees joined by `_`, or `rules` is unknown.
        """
        if isinstance(rules, str):
            rules = parse_rules(rules)
        degrees: dict[str, int] = {}
        for part in name.split("_"):
            match = re.fullmatch(r"([a-z]+)([1-9]\d*)", part)
            axis = _DEGREES.get(match[1]) if match else None
            if not match or axis is None or axis in degrees:
                raise ValueError(
                    f"cannot read {part!r} in partition {name!r}; write degrees of dp,"
                    " tp and pp, each once, joined by '_', such as tp4_pp2 or dp2_tp4."
                )
            degrees[axis] = int(match[2])
        return cls(**degrees, rules=rules)

    @property
    def name(self) -> str:
        parts = [
            f"{short}{getattr(self, axis)}"
            for short, axis in _DEGREES.items()
            if getattr(self, axis) > 1
        ]
        return "_".join(parts) or "tp1"

    @property
    def num_devices(self) -> int:
        return self.data * self.stage * self.tensor

    @property
    def shape(self) -> tuple[int, int, int]:
        """Sizes of the mesh axes data, stage, tensor."""
        return (self.data, self.stage, self.tensor)

    @property
    def axes(self) -> dict[str, int]:
        """Sizes of the mesh axes by name."""
        return {"data": self.data, "stage": self.stage, "tensor": self.tensor}

    @property
    def manual_axes(self) -> tuple[str, ...]:
        """Axes left to `jax.shard_map`: stages, and replicas that share nothing."""
        replicas = self.data > 1 and "data" in self.rules.table["batch"]
        manual = {"data": replicas, "stage": self.stage > 1}
        return tuple(axis for axis in manual if manual[axis])

    def ways(self, dimension: Name, phase: str = "prefill") -> int:
        """Returns into how many pieces the rules cut `dimension`."""
        axes = self.axes
        return math.prod(axes[a] for a in self.rules.axes_of(dimension, phase))

    def sums_stream(self, phase: str) -> bool:
        """Whether blocks end in sums over `tensor`, or one device, of a whole stream.

        So it is where heads and hidden width are split over that axis alone, and
        neither positions nor the width of the residual stream are.
        """

        def split(dimension: str) -> list[str]:
            return [a for a in self.rules.axes_of(dimension, phase) if self.axes[a] > 1]

        parts = ["tensor"] if self.tensor > 1 else []
        whole = not split("embed") and not split("residual_seq")
        return whole and split("heads") == split("mlp") == parts

    def kv_repeat(self, config: ModelConfig) -> int:
        """Returns on how many tensor devices each key/value head is computed."""
        return max(1, self.ways("heads") // config.num_kv_heads)

    def computed(self, config: ModelConfig) -> ModelConfig:
        """Returns the model as it is computed, where pieces must be equal.

        Key/value heads are repeated over tensor devices beyond their number. A hidden
        width or a vocabulary that does not divide is filled up with zeros, to pieces
        of a multiple of 16 columns and 8 tokens.
        """
        mlp, vocab = config.mlp_dim, config.vocab_size
        if mlp_pieces(config) % self.ways("mlp"):
            mlp = _up(mlp, 16 * self.ways("mlp"))
        if vocab % self.ways("vocab"):
            vocab = _up(vocab, 8 * self.ways("vocab"))
        return dataclasses.replace(
            config,
            num_kv_heads=config.num_kv_heads * self.kv_repeat(config),
            mlp_dim=mlp,
            vocab_size=vocab,
        )

    def stage_layers(self, config: ModelConfig) -> tuple[int, ...]:
        """Returns how many layers each stage holds; earlier stages hold the excess."""
        base, excess = divmod(config.num_layers, self.stage)
        return tuple(base + (s < excess) for s in range(self.stage))


def _up(size: int, multiple: int) -> int:
    return math.ceil(size / multiple) * multiple


def parse_rules(name: str) -> AxisRules:
    """Returns the rule table called `name`."""
    if name not in RULES:
        near = difflib.get_close_matches(name, RULES, 1)
        hint = f" Did you mean {near[0]}?" if near else ""
        raise ValueError(
            f"unknown rules {name!r}; tables are {', '.join(RULES)}.{hint} Choose one."
        )
    return RULES[name]


def parse_partitions(
    names: Sequence[str], num_devices: int, rules: str | AxisRules = MEGATRON
) -> tuple[Partition, ...]:
    """Returns the partitions called `names`; `all` stands for every factorisation.

    Args:
      names: partition names, or the one name "all".
      num_devices: of the target; `all` uses exactly so many.
      rules: the rule table inside a stage.

    Raises:
      ValueError: a name cannot be read.
    """
    found: dict[str, Partition] = {}
    for name in names:
        if name == "all":
            every = all_partitions(num_devices, rules)
            found.update((partition.name, partition) for partition in every)
        else:
            partition = Partition.parse(name, rules)
            found[partition.name] = partition
    return tuple(found.values())


def all_partitions(
    num_devices: int, rules: str | AxisRules = MEGATRON
) -> tuple[Partition, ...]:
    """Returns every way to write `num_devices` as data x stage x tensor."""
    if isinstance(rules, str):
        rules = parse_rules(rules)
    divisors = [d for d in range(1, num_devices + 1) if num_devices % d == 0]
    return tuple(
        Partition(data=d, stage=num_devices // (d * t), tensor=t, rules=rules)
        for d in divisors
        for t in reversed(divisors)
        if num_devices % (d * t) == 0
    )


def check(
    config: ModelConfig,
    partition: Partition,
    workload: Workload,
    *,
    num_devices: int | None = None,
    target: str = "the target",
) -> None:
    """Refuses combinations that cannot work, before anything is compiled.

    Args:
      config: the model.
      partition: how it is split.
      workload: what is asked of it.
      num_devices: of the target, where there is one.
      target: its name, for the message.

    Raises:
      ValueError: with what was asked, the facts, the rule and what to change.
    """
    name = f"partition {partition.name} (rules {partition.rules.name})"
    if num_devices is not None and partition.num_devices != num_devices:
        raise ValueError(
            f"{name} needs {partition.num_devices} devices; {target} has"
            f" {num_devices}. A partition uses every device of its target once. Choose"
            " degrees whose product is that number, or another target."
        )
    if partition.stage > config.num_layers:
        raise ValueError(
            f"{name} has {partition.stage} stages for {config.num_layers} layers. A"
            " stage holds at least one layer. Use fewer stages."
        )
    if partition.rules.name == "two_d" and partition.data == 1:
        raise ValueError(
            f"{name} has data degree 1. Two-dimensional weights are split over the data"
            " and the tensor axis. Write, for example, dp2_tp4."
        )
    _check_heads(config, partition, name)
    sizes = {
        "mlp": ("pieces of the feed-forward layer,", MLP_PIECES),
        "embed": ("width", config.embed_dim),
        "residual_seq": ("prompt length", workload.input_len),
    }
    for dimension, (words, size) in sizes.items():
        ways = partition.ways(dimension)
        if size % ways:
            axes = " x ".join(partition.rules.table[dimension])
            raise ValueError(
                f"{name} cuts the {words} {size} into {ways} pieces over {axes}: not"
                " divisible. Pieces must be equal. Choose a degree that divides"
                f" {size}."
            )
    _check_batch(partition, workload, name)


def _check_heads(config: ModelConfig, partition: Partition, name: str) -> None:
    ways, heads, kv_heads = (
        partition.ways("heads"),
        config.num_heads,
        config.num_kv_heads,
    )
    if heads % ways:
        raise ValueError(
            f"{name} splits {heads} query heads over {ways} devices: not divisible."
            " Every device gets the same number of heads. Choose a tensor degree that"
            f" divides {heads}."
        )
    if kv_heads % ways and ways % kv_heads:
        raise ValueError(
            f"{name} splits {kv_heads} key/value heads over {ways} devices: neither"
            " divides the other. Each device gets whole heads, or each head stands on"
            f" equally many devices. Choose a divisor or a multiple of {kv_heads}."
        )


def _check_batch(partition: Partition, workload: Workload, name: str) -> None:
    batch, replicas = workload.batch_size, partition.ways("cache_batch")
    if batch % replicas:
        raise ValueError(
            f"{name} splits batch {batch} over data={replicas}: not divisible. Every"
            " replica gets equally many sequences. Choose a batch that is a multiple of"
            f" {replicas}, or fewer replicas."
        )
    stages = partition.stage
    each = batch // partition.data if "data" in partition.manual_axes else batch
    if each > stages and each % stages:
        raise ValueError(
            f"{name} splits {each} sequences a replica into {stages} groups, one a"
            " stage: not divisible. Groups must be equal. Choose a batch that is a"
            f" multiple of {stages * replicas}, or one below it."
        )
    groups = stages if each >= stages else 1
    size = each // groups
    if "data" not in partition.manual_axes and size % replicas:
        raise ValueError(
            f"{name} splits {size} sequences of each of {groups} groups in flight over"
            f" data={replicas}: not divisible. Every device holds the cache of equally"
            f" many. Choose a batch that is a multiple of {groups * replicas}."
        )
