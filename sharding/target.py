"""Where to compile: devices that are attached, virtual, or not there at all.

A target is written as on the command line:

    attached       the devices of this machine
    cpu:8          virtual CPU devices, which run
    h100:8         NVIDIA GPUs of one host, compiled for and never run; also h200
    v5p:2x2x2      a TPU slice, its chips along each dimension of the torus,
                   compiled for and never run; also v4, v5e, v6e, tpu7x

Call `prepare_environment` with every name first, then `parse_target`. The GPU
descriptions that XLA:GPU needs when there is no GPU were dumped on real ones and lie
beside the chip files. Kernels are then not autotuned: partitioning, fusions,
collectives and buffers are the compiler's own, kernel choices are its defaults.
"""

import dataclasses
import difflib
import functools
import importlib.util
import itertools
import math
import os
import pathlib
import re
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import topologies

from sharding import chips, torus
from sharding.chips import CHIPS, Chip

_CONFIGS = pathlib.Path(chips.__file__).parent
GPUS = tuple(sorted(path.stem for path in _CONFIGS.glob("*.pbtxt")))
TPUS = tuple(name for name, chip in CHIPS.items() if chip.kind == "tpu")
MAX_GPUS = 8  # of one host; NVLink domains larger than that are not modelled
_FORMS = {1: "8", 2: "2x4", 3: "2x2x2"}  # by the number of dimensions
EXAMPLES = "attached, cpu:8, h100:8, h200:8, v5e:2x4, v5p:2x2x2, tpu7x:2x2x1"

# A v4 chip shows its two TensorCores as two devices unless asked for as a megacore.
_TPU_OPTIONS = {"v4": {"chip_config_name": "megacore"}}

# Machine code of a described GPU never runs: make it with little effort, which is a
# fifth of compiling. The optimised HLO, made before, is the same to the letter.
_NEVER_RUN = {
    "xla_gpu_force_compilation_parallelism": 1,
    "xla_backend_optimization_level": 0,
    "xla_llvm_disable_expensive_passes": True,
}

# On a TPU7x the sparse cores run these collectives asynchronously, in instructions that
# libtpu 0.0.52 writes and jaxlib cannot read back before 0.12.
_UNREADABLE_BEFORE_JAX_0_12 = {
    f"xla_tpu_enable_sparse_core_collective_offload_{kind}": "false"
    for kind in ("all_reduce", "all_gather", "reduce_scatter")
}

# libtpu looks for the machine it is on, and says so at length when there is none.
_NO_TPU_HERE = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-8",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # two processes may compile at once
}

# Fields of the dumped GPU descriptions that XLA does not know before jax 0.11.
_NEW_IN_JAX_0_11 = re.compile(
    r"(?m)^ *(collective_memory_granularity|max_blocks_per_multiprocessor"
    r"|reserved_shared_memory_per_block|mem_clock_ghz): .*\n"
)


_MEMORY = re.compile(r"device_memory_size: \d+")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Target:
    """Devices to compile for, and the chip that prices what was compiled.

    Attributes:
      name: as written, e.g. "h100:8".
      platform: "cpu", "cuda", "rocm" or "tpu".
      chip: rates of one chip; see `Chip.per_device`.
      devices: JAX devices; described ones cannot hold arrays.
      compile_only: the devices are described, not there.
    """

    name: str
    platform: str
    chip: Chip
    devices: tuple[jax.Device, ...]
    compile_only: bool

    @property
    def num_devices(self) -> int:
        return len(self.devices)

    @property
    def num_chips(self) -> int:
        """Chips that `devices` are on, counted as `chip` does."""
        return math.ceil(self.num_devices / self.chip.devices_per_chip)

    def first(self, num_devices: int) -> "Target":
        """Returns the first `num_devices` of this target, under its name."""
        return dataclasses.replace(self, devices=self.devices[:num_devices])

    @property
    def compiler_options(self) -> dict[str, Any]:
        """What `jax.stages.Lowered.compile` must be told for this target."""
        if self.compile_only and self.platform == "cuda":
            return {**_NEVER_RUN}
        unreadable = (
            jax.__version_info__ < (0, 12) and self.devices[0].device_kind == "TPU7x"
        )
        return {**_UNREADABLE_BEFORE_JAX_0_12} if unreadable else {}

    def mesh_devices(self, shape: Sequence[int]) -> np.ndarray:
        """Returns devices in the shape of a mesh, neighbours on its last axis.

        On a TPU each group of the last axis is a compact box of the torus (2x2 rather
        than a line of 4), both devices of a chip first; then come the groups of the
        axis before. Elsewhere every device is as near as any other, and they stay in
        their order. Fewer devices than the target has: its first ones.

        Args:
          shape: devices along data, stage and tensor (or any other axes).

        Raises:
          ValueError: the shape needs more devices than there are.
        """
        needed = math.prod(shape)
        if needed > self.num_devices or needed < 1:
            raise ValueError(
                f"a mesh of {'x'.join(map(str, shape))} needs {needed} devices; target"
                f" {self.name!r} has {self.num_devices}. A mesh fits its target. Choose"
                " a smaller mesh or a larger target."
            )
        order = np.arange(needed).reshape(tuple(shape))
        if self.platform == "tpu":
            at = [(*d.coords, d.core_on_chip) for d in self.devices[:needed]]  # pyright: ignore
            order = torus.compact_order(at, shape)
        return np.array(self.devices, dtype=object)[order]


def prepare_environment(names: Sequence[str]) -> None:
    """Sets what JAX and its compilers read once, before they start.

    Unless "attached" is among `names`, JAX is held to the CPU: nothing else is run,
    and looking for accelerators takes time and prints. Variables are also inherited
    by processes started later, which call this too.

    Args:
      names: every target that this process will parse.

    Raises:
      ValueError: a `cpu:N` asks for more devices than JAX has already started with.
    """
    kinds = [name.partition(":")[0] for name in names]
    if set(kinds) & set(TPUS):
        for variable, value in _NO_TPU_HERE.items():
            os.environ.setdefault(variable, value)
    if "attached" not in kinds:
        os.environ["JAX_PLATFORMS"] = "cpu"
        os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
        jax.config.update("jax_platforms", "cpu")
    sizes = [_sizes(name)[0] for name in names if name.startswith("cpu:")]
    wanted = max(sizes, default=0)
    if wanted <= max(1, jax.config.values["jax_num_cpu_devices"]):
        return
    try:
        jax.config.update("jax_num_cpu_devices", wanted)
    except RuntimeError as error:
        found = _cpu_devices()
        if len(found) < wanted:
            raise ValueError(
                f"target cpu:{wanted} needs {wanted} CPU devices; JAX has already"
                f" started with {len(found)}. Their number is fixed when JAX first"
                " uses a device. Call prepare_environment before that, or start with"
                f" --jax_num_cpu_devices={wanted}."
            ) from error


@functools.cache
def parse_target(name: str, chip: str | Chip | None = None) -> Target:
    """Returns the target called `name`.

    The same name gives the same devices, so programs of one target can share arrays.

    Args:
      name: one of the forms at the top of this file.
      chip: price what is compiled as this chip instead of the target's own. A
        described GPU then has this chip's memory: XLA:GPU computes things twice in a
        program that does not fit, which would be priced too.

    Raises:
      ValueError: no such target, or a compiler refuses its shape.
      ModuleNotFoundError: the compiler for it is not installed.
    """
    priced = chips.find_chip(chip) if isinstance(chip, str) else chip
    if name == "attached":
        return _attached(priced)
    kind = name.partition(":")[0]
    if kind not in ("cpu", *GPUS, *TPUS):
        raise ValueError(_unknown(name, kind))
    sizes = _sizes(name)
    compile_only = kind != "cpu"
    if kind == "cpu":
        platform, devices = "cpu", _virtual_cpus(name, sizes)
    elif kind in GPUS:
        memory_bytes = (priced or CHIPS[kind]).hbm_bytes
        platform, devices = "cuda", _described_gpus(name, kind, sizes, memory_bytes)
    else:
        platform, devices = "tpu", _described_tpus(name, kind, sizes)
    return Target(
        name=name,
        platform=platform,
        chip=priced or CHIPS[kind],
        devices=tuple(devices),
        compile_only=compile_only,
    )


def _sizes(name: str) -> tuple[int, ...]:
    """Returns the numbers of a target, (2, 4) for "v5e:2x4"."""
    kind, _, text = name.partition(":")
    dims = {"torus2d": 2, "torus3d": 3}.get(CHIPS[kind].topology, 1)
    if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", text) or text.count("x") != dims - 1:
        what = "devices" if dims == 1 else f"chips along each of its {dims} dimensions"
        raise ValueError(
            f"cannot read {text!r} in target {name!r}: {kind} takes the number of"
            f" {what}, each at least 1. Write it as {kind}:{_FORMS[dims]}."
        )
    return tuple(int(size) for size in text.split("x"))


def _unknown(name: str, kind: str) -> str:
    """Returns why `name` is no target, and what may have been meant."""
    if kind in CHIPS:
        return (
            f"cannot compile for target {name!r}: no compiler runs for {kind} without"
            f" the device itself; the GPUs described here are {', '.join(GPUS)}."
            " Another chip is priced from a program compiled for one of these. Compile"
            f" for another GPU and pass its name: --target=h100:8 --chip={kind}."
        )
    near = difflib.get_close_matches(kind.lower(), ["attached", *CHIPS], n=1)
    hint = f"did you mean {near[0]}? " if near else ""
    return (
        f"no target {name!r}: {hint}There are attached, cpu, {', '.join(GPUS)},"
        f" {', '.join(TPUS)}. A target is a chip, a colon and how many. Write it like"
        f" one of {EXAMPLES}."
    )


def _attached(priced: Chip | None) -> Target:
    devices = tuple(jax.devices())
    kind = devices[0].device_kind
    found = [chip for chip in CHIPS.values() if kind in chip.device_kinds]
    if priced is None and not found:
        known = "; ".join(itertools.chain(*(c.device_kinds for c in CHIPS.values())))
        raise ValueError(
            f"no chip for the {len(devices)} attached devices of kind {kind!r}; the"
            f" known kinds are {known}. Estimates need a chip's rates. Name the nearest"
            f" with --chip (one of {', '.join(CHIPS)}, or your own file.toml)."
        )
    platform = devices[0].platform
    if platform in ("gpu", "cuda", "rocm"):
        version = devices[0].client.platform_version
        platform = "rocm" if "rocm" in version.lower() else "cuda"
    return Target(
        name="attached",
        platform=platform,
        chip=priced or found[0],
        devices=devices,
        compile_only=False,
    )


def _cpu_devices() -> list[jax.Device]:
    try:
        return jax.devices("cpu")
    except RuntimeError:  # JAX was started for other platforms only
        return []


def _virtual_cpus(name: str, sizes: tuple[int, ...]) -> list[jax.Device]:
    devices = _cpu_devices()
    if len(devices) < sizes[0]:
        raise ValueError(
            f"target {name!r} needs {sizes[0]} CPU devices, found {len(devices)}. Their"
            " number is fixed when JAX first uses a device. Call"
            f" prepare_environment([{name!r}]) before that, or start with"
            f" --jax_num_cpu_devices={sizes[0]}."
        )
    return devices[: sizes[0]]


def _described_gpus(
    name: str, kind: str, sizes: tuple[int, ...], memory_bytes: int
) -> list[jax.Device]:
    if sizes[0] > MAX_GPUS:
        raise ValueError(
            f"target {name!r} has {sizes[0]} GPUs; one host has {MAX_GPUS}. Links"
            " between hosts are not modelled, so a GPU target is one host. Choose"
            f" {kind}:1 to {kind}:{MAX_GPUS}."
        )
    plugins = ("jax_plugins.xla_cuda13", "jax_plugins.xla_cuda12")
    if not any(_installed(plugin) for plugin in plugins):
        raise ModuleNotFoundError(_missing(name, "NVIDIA GPUs (no CUDA)", "gpu-aot"))
    config = (_CONFIGS / f"{kind}.pbtxt").read_text(encoding="utf-8")
    config = _MEMORY.sub(f"device_memory_size: {memory_bytes}", config)
    if jax.__version_info__ < (0, 11):
        config = _NEW_IN_JAX_0_11.sub("", config)
    return topologies.get_topology_desc(
        platform="cuda",
        topology_name=kind,
        topology=f"1x1x{sizes[0]}",
        target_config=config,
    ).devices


def _described_tpus(name: str, kind: str, sizes: tuple[int, ...]) -> list[jax.Device]:
    if not _installed("libtpu"):
        raise ModuleNotFoundError(_missing(name, "TPUs", "tpu-aot"))
    options: dict[str, Any] = dict(_TPU_OPTIONS.get(kind, {}))
    if math.prod(sizes) == 1:
        # Else some libtpu want whole hosts of 2x2 chips.
        options["chips_per_host_bounds"] = [1, 1, 1]
    try:
        return topologies.get_topology_desc(name, platform="tpu", **options).devices
    except jax.errors.JaxRuntimeError as error:
        raise ValueError(
            f"cannot describe target {name!r}: {'x'.join(map(str, sizes))} is not a"
            f" slice that libtpu knows of {kind} ({error}). Slices are one chip, a row,"
            " or whole hosts of 2x2 chips. Choose a shape such as"
            f" {kind}:{_FORMS[len(sizes)]}."
        ) from error


def _installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # nor its parent package
        return False


def _missing(name: str, what: str, extra: str) -> str:
    return (
        f"cannot compile for target {name!r}: the compiler for {what} is not installed."
        " No device is needed, only the package. Install it with:"
        f" pip install 'jaxllm[{extra}]'"
    )
