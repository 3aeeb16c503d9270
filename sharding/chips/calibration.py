"""What was measured on a chip: every sample of every micro-benchmark, in one file.

A file of JSON lines, which `experiments.calibrate` writes. The first line, a `Header`,
says on what devices and with which versions; each other line is one `Sample`: a chain
of equal links inside one compiled program, called again and again. Lines are only
appended, so a run that was killed has a file that is read as it is and that the same
command continues; where it continues on more devices of the same kind, their header
stands before their samples. `h100.jsonl` beside `h100.toml` is what makes
`CHIPS["h100"]` a calibrated chip; `--chip=FILE.jsonl` is the chip that FILE names, with
FILE's measurements.

Which benchmarks there are, what one link of each is, and what `at` says of it:

    name        at                            one link
    kernel      devices                       a kernel that does next to nothing
    call        devices, arguments            nothing: a call of a program without work
    copy        bytes                         read what the last kernel wrote, write it
    read        bytes                         read what was not used for long
    vector      flops                         arithmetic outside the matrix units
    matmul      dtype, weights, m, k, n       [m, k] @ [k, n], weights not used for long
    scores      bytes, batch, m, k, n         the same for `batch` pairs at once
    split       m, k, n                       [m, k] @ [k, n] in parts, weights not used
                                              for long
    add         bytes, rows, parts            parts of a product added, and normed
    token       flops, bytes, B, S, N, K, H   one token's attention, the cache not used
                                              for long
    attention   phase, implementation,        one fused attention of a library
                flops, bytes, B, T, S, N, K, H
    collective  kind, group, bytes, wire,     one collective and a kernel that does next
                by, devices                   to nothing; `by` xla's choice, or nccl; by
                                              triton: this project's kernel alone
    apart       the same                      the same with nine such kernels

`split`, `add` and `token` are kernels of this project, `jaxllm.product_kernel`,
`jaxllm.norm_kernel` and `jaxllm.token_kernel`, on one device.
`bytes` are of the whole link, or a collective's payload as the ledger counts it.
"""

import dataclasses
import functools
import hashlib
import json
import math
import pathlib
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

SCHEMA = 1
NAMES = (
    "kernel", "call", "copy", "read", "vector", "matmul", "scores", "split", "add",
    "token", "attention", "collective", "apart",
)  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sample:
    """One micro-benchmark, timed several times.

    Attributes:
      name: one of `NAMES`.
      at: its sizes; see the top of this file.
      links: equal pieces of work that one call runs one after the other.
      slots: kernels of one link, those that only tie it to the next one included.
      calls: of one timed run.
      call_samples_s: a run's time divided by its calls, for every run that counted.
      warmup_samples_s: the same of the runs before.
      steady: the last two of these took equally long.
      time: when, as "2026-11-23T10:00:00Z".
      reason: why there are no times; None where there are.
      kernels: what a profiler saw in three calls, by name: how often, and seconds
        together; empty where none looked.
    """

    name: str
    at: Mapping[str, int | str]
    links: int
    slots: int
    calls: int = 0
    call_samples_s: tuple[float, ...] = ()
    warmup_samples_s: tuple[float, ...] = ()
    steady: bool = False
    time: str = ""
    reason: str | None = None
    kernels: Mapping[str, tuple[int, float]] = dataclasses.field(default_factory=dict)

    @property
    def key(self) -> str:
        """What benchmark this is of, the same for the same sizes."""
        return key_of(self.name, {**self.at, "links": self.links})

    @property
    def call_s(self) -> float:
        """Median time of a call."""
        return statistics.median(self.call_samples_s)

    def __getitem__(self, name: str) -> int:
        """Returns a size, e.g. `sample["bytes"]`."""
        return int(self.at[name])


@dataclasses.dataclass(frozen=True, kw_only=True)
class Header:
    """Where and with what a calibration was made.

    Attributes:
      chip: name of the chip file whose published figures these samples stand beside.
      devices: what `jax.Device.device_kind` said of each device.
      driver: of the devices, or None.
      versions: of jax, jaxlib and what else makes machine code.
      flags: environment variables that change what a compiler makes.
      command: that was run.
      commit: of this project.
      time: of the start.
    """

    chip: str
    devices: tuple[str, ...]
    driver: str | None
    versions: Mapping[str, str]
    flags: Mapping[str, str]
    command: str
    commit: str
    time: str

    @property
    def conditions(self) -> dict[str, Any]:
        """What must be equal for two runs to be continued by each other.

        Of the devices their kinds: how many took part is said with each sample.
        """
        fields = {**dataclasses.asdict(self), "devices": sorted(set(self.devices))}
        return {k: v for k, v in fields.items() if k not in _OF_A_RUN}


_OF_A_RUN = ("command", "commit", "time")


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Calibration:
    """All samples of one file; equal only to itself.

    Attributes:
      headers: where and with what they were made, one for each number of devices.
      samples: the newest of each benchmark, failed ones included.
      digest: of the file; what is priced with other samples is another price.
    """

    headers: tuple[Header, ...]
    samples: tuple[Sample, ...]
    digest: str

    def __repr__(self) -> str:
        return f"Calibration({self.header.chip}, {self}, {self.digest})"

    def __str__(self) -> str:
        kinds = dict.fromkeys(kind for h in self.headers for kind in h.devices)
        what = " and ".join(f"{self._count(kind)} x {kind}" for kind in kinds)
        links = "" if self.select("collective") else ", links as published"
        jax = self.versions.get("jax", "?")
        return f"measured on {what}, {self.date}, jax {jax}{links}"

    def _count(self, kind: str) -> str:
        """Returns how many devices of a kind took part, as "2" or "2 and 4"."""
        counts = {h.devices.count(kind) for h in self.headers} - {0}
        return " and ".join(map(str, sorted(counts)))

    @property
    def header(self) -> Header:
        """The first one."""
        return self.headers[0]

    @property
    def date(self) -> str:
        """The day of the newest sample."""
        return max([s.time for s in self.samples], default=self.header.time)[:10]

    @property
    def versions(self) -> Mapping[str, str]:
        return self.header.versions

    @functools.cached_property
    def _by_name(self) -> Mapping[str, tuple[Sample, ...]]:
        return {
            name: tuple(s for s in self.samples if s.name == name and not s.reason)
            for name in NAMES
        }

    def select(self, name: str, **at: int | str) -> tuple[Sample, ...]:
        """Returns the samples of a benchmark that have times and these sizes."""
        return tuple(
            s
            for s in self._by_name[name]
            if all(s.at.get(label) == value for label, value in at.items())
        )


def key_of(name: str, at: Mapping[str, int | str]) -> str:
    """Returns one benchmark in words.

    Example:
      >>> key_of("copy", {"bytes": 4096, "links": 8})
      'copy bytes=4096 links=8'
    """
    return " ".join([name, *(f"{label}={value}" for label, value in at.items())])


def header_line(header: Header) -> str:
    """Returns the first line of a file."""
    return json.dumps({"schema": SCHEMA, **dataclasses.asdict(header)})


_ALWAYS = ("name", "at", "links", "slots", "steady")


def sample_line(sample: Sample) -> str:
    """Returns the line of one sample, times to 6 digits."""
    fields = {
        name: value
        for name, value in dataclasses.asdict(sample).items()
        if value or name in _ALWAYS
    }
    for name in ("call_samples_s", "warmup_samples_s"):
        if name in fields:
            fields[name] = [float(f"{s:.6g}") for s in fields[name]]
    return json.dumps(fields)


def read_calibration(path: pathlib.Path | str) -> Calibration:
    """Returns what is in a file; a last line that was cut off is left out.

    Raises:
      ValueError: it is no calibration, or one of another schema, or a whole line is
        damaged.
    """
    path = pathlib.Path(path)
    data = path.read_bytes()
    *lines, _ = data.split(b"\n")
    if not lines:
        raise ValueError(_unreadable(path, 1, "it is empty"))
    headers: list[Header] = []
    newest: dict[str, Sample] = {}
    for number, line in enumerate(lines, start=1):
        try:
            fields = json.loads(line)
            if not headers or "schema" in fields:
                headers.append(_parse_header(fields))
            else:
                sample = _parse_sample(fields)
                newest[sample.key] = sample
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(_unreadable(path, number, str(error))) from error
    return Calibration(
        headers=tuple(headers),
        samples=tuple(newest.values()),
        digest=hashlib.sha256(data).hexdigest()[:16],
    )


def _unreadable(path: pathlib.Path, number: int, why: str) -> str:
    return (
        f"cannot read line {number} of {path.name}: {why}. A calibration is a line of"
        f" conditions with schema {SCHEMA}, then a line for each benchmark. Remove the"
        " line, or make the file again with experiments.calibrate."
    )


def _parse_header(fields: dict[str, Any]) -> Header:
    """Returns the header in a line of a file.

    Raises:
      ValueError: it is of another schema.
    """
    fields = dict(fields)
    schema = fields.pop("schema", None)
    if schema != SCHEMA:
        raise ValueError(f"its schema is {schema!r}")
    return Header(**{**fields, "devices": tuple(fields["devices"])})


def _parse_sample(fields: dict[str, Any]) -> Sample:
    """Returns the sample in another line of a file.

    Raises:
      ValueError: its benchmark is not known, or its times are none.
    """
    fields = dict(fields)
    for name in ("call_samples_s", "warmup_samples_s"):
        fields[name] = tuple(map(float, fields.get(name, ())))
    kernels = fields.get("kernels", {})
    sample = Sample(
        **{**fields, "kernels": {name: (int(n), s) for name, (n, s) in kernels.items()}}
    )
    if sample.name not in NAMES:
        raise ValueError(f"no benchmark {sample.name!r}; there are {', '.join(NAMES)}")
    times: Sequence[float] = sample.call_samples_s
    if not (sample.reason or times) or not all(0 < t < math.inf for t in times):
        raise ValueError(f"{sample.key} has the times {list(times)}")
    return sample
