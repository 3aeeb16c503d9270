"""What a JAX profile says the devices ran: kernels by name, how often and how long.

Reads the `trace.json.gz` that `jax.profiler` writes, in Chrome's trace format: events
with a process, which is a device, and a thread, which is one of its streams. Lines that
the profiler derives from the kernels ("XLA Ops", "Steps") are left out, or each kernel
would count several times.
"""

import collections
import dataclasses
import gzip
import json
import pathlib
from typing import Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class Kernel:
    """All executions of the kernels of one name on one device.

    Attributes:
      device: as the profiler calls it, e.g. "/device:GPU:0".
      name: of the kernel, or "Memcpy..." for a copy.
      count: executions.
      total_s: their time; kernels on different streams may overlap.
    """

    device: str
    name: str
    count: int
    total_s: float


def read_kernels(path: pathlib.Path) -> list[Kernel]:
    """Returns the kernels of a profile, by device, the longest in all first.

    Empty where the profiler saw no stream, as on CPUs.
    """
    with gzip.open(path) as file:
        events: list[dict[str, Any]] = json.load(file)["traceEvents"]
    devices: dict[int, str] = {}
    threads: dict[tuple[int, int], str] = {}
    for event in events:
        if event.get("name") == "process_name":
            devices[event["pid"]] = event["args"]["name"]
        elif event.get("name") == "thread_name":
            threads[event["pid"], event["tid"]] = event["args"]["name"]
    durations_us: dict[tuple[str, str], list[float]] = collections.defaultdict(list)
    for event in events:
        if event.get("ph") != "X":
            continue
        thread = threads.get((event["pid"], event["tid"]), "")
        device = devices.get(event["pid"], "")
        if device.startswith("/device:") and thread.startswith("Stream"):
            durations_us[device, event["name"]].append(float(event["dur"]))
    found = [
        Kernel(device=device, name=name, count=len(each), total_s=sum(each) / 1e6)
        for (device, name), each in durations_us.items()
    ]
    return sorted(found, key=lambda k: (k.device, -k.total_s))


def as_text(kernels: list[Kernel]) -> str:
    """Returns kernels as tab-separated lines under a line of headings."""
    lines = ["device\tcount\ttotal_us\teach_us\tname"]
    lines += [
        f"{k.device}\t{k.count}\t{1e6 * k.total_s:.1f}\t{1e6 * k.total_s / k.count:.2f}"
        f"\t{k.name}"
        for k in kernels
    ]
    return "\n".join(lines) + "\n"
