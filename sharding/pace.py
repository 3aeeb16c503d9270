"""Which of the attached devices compute slower, and where they stand in a mesh.

GPUs of one host bear one name and do not keep one pace: under its power cap each finds
a clock of its own, and two H100s multiply up to 9 % apart. Devices that share a layer
wait for the slowest, whatever their order; a pipeline's last stage has less to do where
the last layer of a prompt is short (`Program.last_layer`), so the slowest belong there.
"""

import concurrent.futures
import dataclasses
import time
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from sharding.partition import Partition
from sharding.target import Target

# Products of a square matrix: 14 TFLOP a call, which an H100 computes in 20 ms. Power
# and clocks settle within the calls that do not count.
_SIZE, _PRODUCTS = 8192, 13
_BEFORE_S, _COUNTED_S = 1.0, 1.5


def paces(
    devices: Sequence[jax.Device],
    *,
    size: int = _SIZE,
    before_s: float = _BEFORE_S,
    counted_s: float = _COUNTED_S,
) -> tuple[float, ...]:
    """Returns products a second of each of `devices`, 1 for the fastest.

    All of them multiply at once, bfloat16 matrices of random numbers, as long as it
    takes for power and clocks to settle and then as long as counts.

    Args:
      devices: attached.
      size: of the matrices.
      before_s: seconds that do not count.
      counted_s: seconds that do.
    """

    @jax.jit
    def multiply(x: jax.Array, weight: jax.Array) -> jax.Array:
        # Of variance 1 / size, so that numbers stay as they are.
        return jax.lax.fori_loop(0, _PRODUCTS, lambda _, y: y @ weight, x)

    def rate(device: jax.Device) -> float:
        keys = jax.random.split(jax.device_put(jax.random.key(0), device))
        x = jax.random.normal(keys[0], (size, size), jnp.bfloat16)
        weight = jax.random.normal(keys[1], (size, size), jnp.bfloat16) / size**0.5
        for least_s in (0, before_s):
            x, _ = _repeat(multiply, x, weight, least_s)
        return _repeat(multiply, x, weight, counted_s)[1]

    with concurrent.futures.ThreadPoolExecutor(len(devices)) as pool:
        rates = tuple(pool.map(rate, devices))
    return tuple(each / max(rates) for each in rates)


def _repeat(
    multiply: jax.stages.Wrapped, x: jax.Array, weight: jax.Array, least_s: float
) -> tuple[jax.Array, float]:
    """Returns the last product, and calls a second over at least `least_s`."""
    start, calls = time.perf_counter(), 0
    while True:
        x = jax.block_until_ready(multiply(x, weight))
        calls += 1
        passed_s = time.perf_counter() - start
        if passed_s >= least_s:
            return x, calls / passed_s


def slowest_last(
    target: Target, partition: Partition, found: Mapping[jax.Device, float]
) -> Target:
    """Returns `target` with its slowest devices in the last stage of `partition`.

    Args:
      target: devices, as many as `partition` takes.
      partition: how they are shared.
      found: their `paces`.
    """
    falling = np.argsort([-found[device] for device in target.devices], kind="stable")
    data, stage, tensor = partition.shape
    order = falling.reshape(stage, data, tensor).swapaxes(0, 1).ravel()
    devices = tuple(target.devices[i] for i in order)
    return dataclasses.replace(target, devices=devices)
