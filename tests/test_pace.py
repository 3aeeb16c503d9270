"""The slowest devices stand in the last stage."""

import dataclasses

import jax
import numpy as np
import pytest

from sharding import pace
from sharding.partition import Partition
from sharding.target import parse_target


@pytest.mark.parametrize(
    ("name", "found", "stages"),
    [
        ("pp2", [0.9, 1.0], [[1], [0]]),
        ("pp2", [1.0, 0.9], [[0], [1]]),
        ("pp2", [1.0, 1.0], [[0], [1]]),
        ("pp4", [0.8, 1.0, 0.9, 0.95], [[1], [3], [2], [0]]),
        ("tp2_pp2", [0.8, 1.0, 0.9, 0.95], [[1, 3], [2, 0]]),
        ("dp2_pp2", [0.8, 1.0, 0.9, 0.95], [[1, 3], [2, 0]]),
    ],
)
def test_the_slowest_devices_are_the_last_stage(
    name: str, found: list[float], stages: list[list[int]]
) -> None:
    partition = Partition.parse(name)
    target = parse_target("cpu:8").first(partition.num_devices)
    devices = target.devices
    placed = pace.slowest_last(
        target, partition, dict(zip(devices, found, strict=True))
    )
    grid = np.swapaxes(placed.mesh_devices(partition.shape), 0, 1)
    numbers = [[devices.index(d) for d in stage.flat] for stage in grid]
    assert numbers == stages
    assert dataclasses.replace(placed, devices=devices) == target


def test_paces_are_beside_the_fastest() -> None:
    devices = jax.devices()[:2]
    found = pace.paces(devices, size=64, before_s=0.0, counted_s=0.1)
    assert len(found) == 2
    assert max(found) == 1.0
    assert min(found) > 0


def test_a_slow_device_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    slow = jax.devices()[1]
    true = jax.block_until_ready

    def wait(x: jax.Array) -> jax.Array:
        if slow in x.devices():
            pace.time.sleep(0.02)
        return true(x)

    monkeypatch.setattr(jax, "block_until_ready", wait)
    found = pace.paces(jax.devices()[:2], size=32, before_s=0.0, counted_s=0.2)
    assert found[1] < 0.5 * found[0]
