"""Targets give the devices they name, with no such device on this machine.

Describing TPUs needs libtpu and describing GPUs needs the CUDA plugin; where one is
not installed its tests are skipped with that reason. CI installs both.
"""

import importlib.util
import math
import os
import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from sharding import target, torus
from sharding.target import Target, parse_target, prepare_environment


def _missing(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is None
    except ModuleNotFoundError:
        return True


needs_gpu_compiler = pytest.mark.skipif(
    _missing("jax_plugins.xla_cuda13"), reason="needs pip install 'jaxllm[gpu-aot]'"
)
needs_tpu_compiler = pytest.mark.skipif(
    _missing("libtpu"), reason="needs pip install 'jaxllm[tpu-aot]'"
)


@pytest.mark.parametrize(
    ("name", "chip", "platform", "num_chips", "num_devices", "device_kind"),
    [
        ("cpu:8", "cpu", "cpu", 8, 8, "cpu"),
        ("cpu:3", "cpu", "cpu", 3, 3, "cpu"),
        pytest.param("h100:1", "h100", "cuda", 1, 1, "NVIDIA H100 80GB HBM3",
                     marks=needs_gpu_compiler),
        pytest.param("h100:8", "h100", "cuda", 8, 8, "NVIDIA H100 80GB HBM3",
                     marks=needs_gpu_compiler),
        pytest.param("h200:5", "h200", "cuda", 5, 5, "NVIDIA H200",
                     marks=needs_gpu_compiler),
        # A v4 megacore is one device, a v5p chip too; a TPU7x chip is two.
        pytest.param("v4:2x2x2", "v4", "tpu", 8, 8, "TPU v4",
                     marks=needs_tpu_compiler),
        pytest.param("v5e:2x4", "v5e", "tpu", 8, 8, "TPU v5 lite",
                     marks=needs_tpu_compiler),
        pytest.param("v5p:2x2x2", "v5p", "tpu", 8, 8, "TPU v5",
                     marks=needs_tpu_compiler),
        pytest.param("v6e:2x4", "v6e", "tpu", 8, 8, "TPU v6 lite",
                     marks=needs_tpu_compiler),
        pytest.param("v6e:1x1", "v6e", "tpu", 1, 1, "TPU v6 lite",
                     marks=needs_tpu_compiler),
        pytest.param("tpu7x:2x2x1", "tpu7x", "tpu", 4, 8, "TPU7x",
                     marks=needs_tpu_compiler),
        pytest.param("tpu7x:1x1x1", "tpu7x", "tpu", 1, 2, "TPU7x",
                     marks=needs_tpu_compiler),
    ],
)  # fmt: skip
def test_target_has_the_devices_it_names(
    name: str,
    chip: str,
    platform: str,
    num_chips: int,
    num_devices: int,
    device_kind: str,
) -> None:
    found = parse_target(name)
    assert (found.name, found.chip.name, found.platform) == (name, chip, platform)
    assert (found.num_chips, found.num_devices) == (num_chips, num_devices)
    assert {d.device_kind for d in found.devices} == {device_kind}
    assert device_kind in found.chip.device_kinds
    assert found.compile_only == (platform != "cpu")
    assert parse_target(name).devices is found.devices


@pytest.mark.parametrize(
    "name",
    [
        pytest.param("h100:8", marks=needs_gpu_compiler),
        pytest.param("v5e:2x4", marks=needs_tpu_compiler),
        pytest.param("tpu7x:2x2x1", marks=needs_tpu_compiler),
    ],
)
def test_described_devices_compile_and_split_work(name: str) -> None:
    found = parse_target(name)
    axes = ("data", "stage", "tensor")
    devices = found.mesh_devices((1, 2, 4))
    mesh = Mesh(devices, axes, axis_types=(AxisType.Auto,) * 3)

    def shape(shape: tuple[int, int], *spec: str | None) -> jax.ShapeDtypeStruct:
        sharding = NamedSharding(mesh, PartitionSpec(*spec))
        return jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=sharding)

    # Contracting a split dimension needs the sum over tensor.
    x, w = shape((256, 512), None, "tensor"), shape((512, 384), "tensor", None)
    lowered = jax.jit(lambda x, w: x @ w).lower(x, w)
    compiled = lowered.compile(compiler_options=found.compiler_options)
    memory = compiled.memory_analysis()
    assert memory is not None
    assert memory.argument_size_in_bytes == 2 * (256 * 512 + 512 * 384) // 4
    assert "all-reduce" in (compiled.as_text() or "")


@needs_gpu_compiler
def test_another_chip_can_price_a_target() -> None:
    found = parse_target("h100:8", "mi325x")
    assert (found.chip.name, found.num_chips) == ("mi325x", 8)
    assert found.devices[0].device_kind == "NVIDIA H100 80GB HBM3"
    # Two devices make one TPU7x, whatever they were compiled for.
    assert parse_target("h100:8", "tpu7x").num_chips == 4


def test_attached_is_this_machine() -> None:
    found = parse_target("attached")
    assert found.devices == tuple(jax.devices())
    assert (found.platform, found.chip.name, found.compile_only) == (
        "cpu",
        "cpu",
        False,
    )


def _attach(
    monkeypatch: pytest.MonkeyPatch, kind: str, platform: str, version: str
) -> None:
    client = types.SimpleNamespace(platform_version=version)
    device = types.SimpleNamespace(device_kind=kind, platform=platform, client=client)
    monkeypatch.setattr(jax, "devices", lambda: [device] * 4)


@pytest.mark.parametrize(
    ("kind", "platform", "version", "chip", "on"),
    [
        ("NVIDIA H200", "gpu", "PJRT CUDA 13.0", "h200", "cuda"),
        ("NVIDIA A100-SXM4-80GB", "gpu", "PJRT CUDA 13.0", "a100", "cuda"),
        ("AMD Instinct MI300X", "gpu", "PJRT ROCm 70000", "mi300x", "rocm"),
        ("TPU v5 lite", "tpu", "libtpu", "v5e", "tpu"),
    ],
)
def test_attached_chip_is_known_by_its_kind(
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
    platform: str,
    version: str,
    chip: str,
    on: str,
) -> None:
    _attach(monkeypatch, kind, platform, version)
    found = target._attached(None)
    assert (found.chip.name, found.platform, found.num_devices) == (chip, on, 4)


def test_unknown_attached_chip_asks_for_a_name(monkeypatch: pytest.MonkeyPatch) -> None:
    _attach(monkeypatch, "NVIDIA H100 PCIe", "gpu", "PJRT CUDA 13.0")
    with pytest.raises(ValueError, match=r"4 attached devices .*H100 PCIe.* --chip"):
        target._attached(None)
    assert target._attached(target.CHIPS["h100"]).chip.name == "h100"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("h10:8", r"no target 'h10:8': did you mean h100\?"),
        ("H100:8", r"did you mean h100\?"),
        ("v5:2x2x2", r"did you mean v5[ep]\?"),
        ("gpu:8", r"no target 'gpu:8': .*There are attached, cpu, h100, h200"),
        ("", r"no target ''"),
        ("mi300x:8", r"--target=h100:8 --chip=mi300x"),
        ("b200:8", r"--target=h100:8 --chip=b200"),
        ("h100", r"cannot read '' in target 'h100': .*Write it as h100:8"),
        ("h100:0", r"cannot read '0'"),
        ("h100:8x", r"cannot read '8x'"),
        ("h100:2x4", r"cannot read '2x4' in target 'h100:2x4': .*Write it as h100:8"),
        ("h100:9", r"has 9 GPUs; one host has 8"),
        ("v5e:8", r"each of its 2 dimensions.*Write it as v5e:2x4"),
        ("v5e:2x2x2", r"each of its 2 dimensions"),
        ("v5p:2x4", r"each of its 3 dimensions.*Write it as v5p:2x2x2"),
        ("cpu:4096", r"needs 4096 CPU devices, found 9.*--jax_num_cpu_devices=4096"),
        pytest.param("v5e:3x5", r"3x5 is not a slice .*Choose a shape such as v5e:2x4",
                     marks=needs_tpu_compiler),
    ],
)  # fmt: skip
def test_wrong_target_is_answered_helpfully(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_target(name)


@pytest.mark.parametrize(
    ("name", "extra"), [("h200:7", "gpu-aot"), ("v5p:2x2x4", "tpu-aot")]
)
def test_missing_compiler_is_named_with_its_install_command(
    monkeypatch: pytest.MonkeyPatch, name: str, extra: str
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError) as error:
        parse_target(name)
    assert f"pip install 'jaxllm[{extra}]'" in str(error.value)


def _run(code: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Runs code in a process whose JAX has not started."""
    drop = ("JAX_", "TPU_", "ALLOW_MULTIPLE", "XLA_FLAGS")
    clean = {k: v for k, v in os.environ.items() if not k.startswith(drop)}
    clean["PYTHONPATH"] = os.pathsep.join(sys.path)
    command = [sys.executable, "-c", code]
    return subprocess.run(
        command, env=clean | variables, capture_output=True, text=True, check=True
    )


@needs_tpu_compiler
@needs_gpu_compiler
def test_fresh_process_describes_everything_and_prints_nothing() -> None:
    """JAX_PLATFORMS=cuda stands for a shell set up to run on GPUs."""
    names = ["cpu:5", "h100:2", "v5e:2x2", "tpu7x:1x1x1"]
    code = (
        "from sharding.target import parse_target, prepare_environment\n"
        f"prepare_environment({names})\n"
        f"print([parse_target(name).num_devices for name in {names}])\n"
    )
    done = _run(code, JAX_PLATFORMS="cuda")
    assert done.stdout == "[5, 2, 4, 2]\n"
    assert done.stderr == ""


def test_environment_is_prepared_too_late_only_where_it_matters() -> None:
    code = (
        "import jax\n"
        "from sharding.target import parse_target, prepare_environment\n"
        "prepare_environment(['cpu:4'])\n"
        "assert len(jax.devices()) == 4\n"
        "prepare_environment(['cpu:2', 'v5p:2x2x1', 'h100:8'])\n"
        "assert parse_target('cpu:2').num_devices == 2\n"
        "try:\n"
        "    prepare_environment(['cpu:2', 'cpu:6'])\n"
        "except ValueError as error:\n"
        "    print(error)\n"
    )
    done = _run(code)
    assert "cpu:6 needs 6 CPU devices; JAX has already started with 4" in done.stdout


def test_attached_leaves_the_platform_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JAX_PLATFORMS", "cuda")
    prepare_environment(["attached", "h100:8"])
    assert os.environ["JAX_PLATFORMS"] == "cuda"


def test_cpu_mesh_keeps_the_order_of_devices() -> None:
    placed = parse_target("cpu:8").mesh_devices((2, 1, 3))
    assert [d.id for d in placed.flat] == [0, 1, 2, 3, 4, 5]
    with pytest.raises(ValueError, match=r"2x3x4 needs 24 devices; .*'cpu:8' has 8"):
        parse_target("cpu:8").mesh_devices((2, 3, 4))


def _grid(*extents: int) -> list[tuple[int, ...]]:
    return [tuple(map(int, p)) for p in np.ndindex(*extents)]


@pytest.mark.parametrize("shape", [(1, 1, 8), (1, 2, 4), (1, 4, 2), (2, 2, 2)])
@pytest.mark.parametrize("extents", [(2, 4, 1, 1), (2, 2, 2, 1), (2, 2, 1, 2)])
def test_tensor_groups_are_compact_boxes_of_neighbours(
    extents: tuple[int, ...], shape: tuple[int, ...]
) -> None:
    grid = _grid(*extents)
    order = torus.compact_order(grid, shape)
    assert sorted(order.flat) == list(range(8))
    for group in order.reshape(-1, shape[-1]):
        at = np.array([grid[i] for i in group])
        # Each is beside the one before, and the group fills its bounding box.
        assert np.abs(np.diff(at, axis=0)).sum(axis=1).tolist() == [1] * (len(at) - 1)
        sides = np.ptp(at, axis=0) + 1
        assert math.prod(sides.tolist()) == len(at)
        dims = sum(extent > 1 for extent in extents)
        assert (sorted(sides, reverse=True)[:dims]) == list(
            torus.compact_box(len(at), dims)
        )


def test_tpu7x_tensor_pair_is_one_chip() -> None:
    grid = _grid(2, 2, 1, 2)
    order = torus.compact_order(grid, (1, 4, 2))
    assert all(grid[a][:3] == grid[b][:3] for a, b in order.reshape(-1, 2))


@pytest.mark.parametrize("shape", [(3, 2), (6, 1)])
def test_odd_grid_keeps_its_order(shape: tuple[int, int]) -> None:
    line_with_a_hole = [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (2, 2)]
    order = torus.compact_order(line_with_a_hole, shape)
    assert order.tolist() == np.arange(6).reshape(shape).tolist()


@needs_tpu_compiler
def test_described_tpus_are_placed_by_their_coordinates() -> None:
    found: Target = parse_target("v5e:2x4")
    group = found.mesh_devices((1, 2, 4))[0, 0]
    assert [tuple(d.coords[:2]) for d in group] == [(0, 0), (0, 1), (1, 1), (1, 0)]
