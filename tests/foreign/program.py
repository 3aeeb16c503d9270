"""What a foreign program is: code as people write it, and what it must cost.

A foreign program knows nothing of this project. It is compiled for a described
machine by make.py; tests/test_hlo_foreign.py compares what `sharding.hlo` reads from
the compiler's text with the closed forms written beside the program. All figures are
of one device and one call; sizes are all different.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

P = PartitionSpec
F32, BF16, I32 = jnp.float32, jnp.bfloat16, jnp.int32

# (axis, kind) -> (executions, payload bytes of them all)
Sends = Mapping[tuple[str, str], tuple[int, int]]

# Two generations. Both multiply float32 as bfloat16 unless told otherwise, and so send
# what only feeds a product at half the bytes.
TPUS = ("v5e", "v5p")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Program:
    """A function of abstract arrays, and the closed forms of its cost.

    Attributes:
      function: what is compiled.
      arguments: abstract, with shardings.
      matmul_flops: of matrix products and convolutions.
      matmul_flops_on: the same by chip, or chip and release, where a compiler really
        does otherwise.
      outputs_bytes: of the results, on one device.
      donated: positions of arguments whose buffers may be overwritten.
      sends: collectives.
      sends_on: collectives by chip, where a compiler really does otherwise.
      least_hbm_bytes: what must move. None: all arguments and results, less those that
        a collective reads or writes.
      most_hbm_bytes: what a good compiler would not exceed on an accelerator, if that
        is known.
      flops: least and most of all operations, matrix products included.
      trip_counts: of the loops in the text, outermost first; None: not checked.
      data_dependent: loops of unknown length, counted for one iteration.
      options: compiler options, by chip.
      refused_by: chips whose compiler does not take the program.
    """

    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    matmul_flops: int
    outputs_bytes: int
    donated: tuple[int, ...] = ()
    sends: Sends = dataclasses.field(default_factory=dict)
    matmul_flops_on: Mapping[str, int] = dataclasses.field(default_factory=dict)
    sends_on: Mapping[str, Sends] = dataclasses.field(default_factory=dict)
    least_hbm_bytes: int | None = None
    most_hbm_bytes: int | None = None
    flops: tuple[int, int] | None = None
    trip_counts: tuple[float | None, ...] | None = None
    data_dependent: int = 0
    options: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)
    refused_by: tuple[str, ...] = ()

    @property
    def arguments_bytes(self) -> int:
        """Bytes of all arguments on one device."""
        return sum(_local_bytes(a) for a in jax.tree.leaves(self.arguments))


def on(chips: tuple[str, ...], value: Any) -> dict[str, Any]:
    """Returns `value` for each of `chips`, such as "cpu" or "cpu.jax0.10"."""
    return dict.fromkeys(chips, value)


Make = Callable[[Mesh], Program]
PROGRAMS: dict[str, tuple[dict[str, int], Make]] = {}


def foreign(**axes: int) -> Callable[[Make], Make]:
    """Registers a program under its function's name, with its mesh of 8 devices."""
    assert math.prod(axes.values()) == 8

    def register(make: Make) -> Make:
        PROGRAMS[make.__name__] = (axes, make)
        return make

    return register


def array(mesh: Mesh, shape: tuple[int, ...], *spec: Any, dtype: Any = F32):
    """Returns an abstract array, sharded by `spec`."""
    return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, P(*spec)))


def place(mesh: Mesh, x: jax.Array, *spec: Any) -> jax.Array:
    """Asks the partitioner to lay `x` out by `spec`."""
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, P(*spec)))


def _local_bytes(x: jax.ShapeDtypeStruct) -> int:
    assert x.sharding is not None
    local = x.sharding.shard_shape(x.shape)
    return math.prod(local) * jnp.dtype(x.dtype).itemsize
