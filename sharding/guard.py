"""Whether devices are ours alone: what is shared with another process is not timed.

NVIDIA GPUs are asked through `nvidia-smi`, which comes with the driver. Before this
process has used a GPU, nothing may run on it, hold memory of it, or keep it busy;
afterwards, no other process may. Of CPUs only the load average is known, which other
work raises as much as ours: it is a warning and never a refusal.
"""

import dataclasses
import math
import os
import subprocess
import threading
from collections.abc import Callable, Collection, Sequence

IDLE_PERCENT = 5  # utilisation that an idle GPU may show
IDLE_BYTES = 1 << 30  # memory that the driver may hold for itself
# Bits of `clocks_event_reasons.active` that mean less speed, from NVML's header
# (nvml.h, nvmlClocksEventReason*).
_SLOWER = {
    0x04: "power cap",
    0x08: "hardware slowdown",
    0x20: "hot (software)",
    0x40: "hot (hardware)",
    0x80: "power brake",
}
_GPU_FIELDS = (
    "index", "uuid", "name", "driver_version", "utilization.gpu", "memory.used",
    "clocks.sm", "clocks.max.sm", "power.draw", "temperature.gpu",
    "clocks_event_reasons.active",
)  # fmt: skip
Ask = Callable[[Sequence[str]], str]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Process:
    """A process that computes on a GPU."""

    pid: int
    name: str
    gpu: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gpu:
    """What one GPU does at present, as its driver says."""

    index: int
    uuid: str
    name: str
    driver: str
    busy_percent: float
    used_bytes: float
    sm_mhz: float
    max_sm_mhz: float
    power_w: float
    celsius: float
    slowed_by: tuple[str, ...]

    def __str__(self) -> str:
        slowed = f", slowed by {' and '.join(self.slowed_by)}" if self.slowed_by else ""
        return (
            f"GPU {self.index}: {self.sm_mhz:.0f} of {self.max_sm_mhz:.0f} MHz,"
            f" {self.power_w:.0f} W, {self.celsius:.0f} C, {self.busy_percent:.0f} %"
            f" busy, {self.used_bytes / 1e9:.1f} GB used{slowed}"
        )


def smi(arguments: Sequence[str]) -> str:
    """Returns what `nvidia-smi` prints; nothing if there is none or it fails."""
    try:
        done = subprocess.run(
            ("nvidia-smi", *arguments),
            capture_output=True,
            text=True,
            timeout=30,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout


def gpus(ask: Ask = smi) -> list[Gpu]:
    """Returns the GPUs that this process may use; none where there is no driver."""
    rows = _rows(ask((f"--query-gpu={','.join(_GPU_FIELDS)}", *_CSV)))
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    wanted = None if visible is None else visible.split(",")
    return [
        Gpu(
            index=int(row[0]),
            uuid=row[1],
            name=row[2],
            driver=row[3],
            busy_percent=_number(row[4]),
            used_bytes=_number(row[5]) * 2**20,
            sm_mhz=_number(row[6]),
            max_sm_mhz=_number(row[7]),
            power_w=_number(row[8]),
            celsius=_number(row[9]),
            slowed_by=_slowed_by(row[10]),
        )
        for row in rows
        if wanted is None or row[0] in wanted or row[1] in wanted
    ]


def processes(ask: Ask = smi) -> list[Process]:
    """Returns every process that computes on a GPU of this machine."""
    rows = _rows(ask(("--query-compute-apps=pid,gpu_uuid,process_name", *_CSV)))
    return [Process(pid=int(r[0]), gpu=r[1], name=",".join(r[2:])) for r in rows]


_CSV = ("--format=csv,noheader,nounits",)


def others(ours: Collection[int], ask: Ask = smi) -> list[str]:
    """Returns what processes other than `ours` compute on our GPUs, in words."""
    index = {gpu.uuid: gpu.index for gpu in gpus(ask)}
    return [
        f"GPU {index[p.gpu]} is used by process {p.pid} ({p.name})"
        for p in processes(ask)
        if p.gpu in index and p.pid not in ours
    ]


def before_start(ask: Ask = smi) -> list[str]:
    """Returns what keeps GPUs busy that this process has not used yet, in words."""
    found = others((), ask)
    for gpu in gpus(ask):
        if any(text.startswith(f"GPU {gpu.index} ") for text in found):
            continue
        # A process in another container is not listed, but shows in these.
        if gpu.busy_percent > IDLE_PERCENT:
            found.append(f"GPU {gpu.index} is {gpu.busy_percent:.0f} % busy")
        elif gpu.used_bytes > IDLE_BYTES:
            found.append(f"GPU {gpu.index} has {gpu.used_bytes / 1e9:.1f} GB in use")
    return found


def while_running(run: Callable[[], object], ask: Ask = smi) -> list[Gpu]:
    """Returns what the GPUs do while `run` keeps them busy."""
    seen: list[Gpu] = []
    thread = threading.Thread(target=lambda: seen.extend(gpus(ask)))
    thread.start()
    run()
    thread.join()
    return seen


def refuse(found: Sequence[str]) -> None:
    """Refuses to time on devices that are in use.

    Args:
      found: from `before_start` or `others`.

    Raises:
      ValueError: `found` names something.
    """
    if found:
        raise ValueError(
            f"cannot time on these devices: {'; '.join(found)}. What another process"
            " uses too is not ours to time, for both would be slower. Wait until it is"
            " done, hide that GPU with CUDA_VISIBLE_DEVICES, or pass --if_busy=warn to"
            " go on and have it in the record."
        )


def load_warning(average: float | None = None, cores: int | None = None) -> list[str]:
    """Returns whether this machine's processors were busy in the last minute.

    Example:
      >>> load_warning(average=3.5, cores=2)
      ['load average 3.5 on 2 cores: CPU times are not ours alone']
      >>> load_warning(average=0.4, cores=2)
      []
    """
    average = os.getloadavg()[0] if average is None else average
    cores = os.cpu_count() or 1 if cores is None else cores
    if average <= cores / 2:
        return []
    return [
        f"load average {average:.1f} on {cores} cores: CPU times are not ours alone"
    ]


def _rows(text: str) -> list[list[str]]:
    lines = [line for line in text.splitlines() if line.count(",") >= 2]
    return [[cell.strip() for cell in line.split(",")] for line in lines]


def _number(text: str) -> float:
    """Returns a figure; not a number where the driver says "[N/A]"."""
    try:
        return float(text)
    except ValueError:
        return math.nan


def _slowed_by(text: str) -> tuple[str, ...]:
    try:
        bits = int(text, 16)
    except ValueError:  # "[N/A]"
        return ()
    return tuple(name for bit, name in _SLOWER.items() if bits & bit)
