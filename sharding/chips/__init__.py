"""Chips: peak rates, memory and links, a data file each, a source for every figure.

`CHIPS["h100"]` is read from `h100.toml` beside this file. To add a chip, copy the
file of a similar one, change the figures and their sources, and name it in
`docs/`; `load_chip` says what is missing. Rates are dense (no sparsity) and of a
whole chip: `Chip.per_device` gives the share of one JAX device.

A source that starts with "measured" was timed by this project, one that starts
with "assumed" is a guess that says what it leans on, and everything else is
published by the vendor or by whoever is named.

A chip that somebody measured has its samples in `h100.jsonl` beside `h100.toml`
(`sharding.chips.calibration`); then `Chip.calibrated` is not None, and
`sharding.rates` asks them instead of the peaks. `h100@published` is the chip without.
"""

import dataclasses
import difflib
import math
import pathlib
import tomllib
from collections.abc import Mapping
from typing import Any

from sharding.chips.calibration import Calibration, read_calibration

KINDS = ("gpu", "tpu", "cpu")

# How chips are wired; `sharding.estimate` says what each means for a collective.
TOPOLOGIES = ("switch", "mesh", "torus2d", "torus3d")

# What JAX and NumPy call the dtypes of `flops_per_s`. float16 runs at the rate of
# bfloat16 on every chip here.
_DTYPES = {
    "bfloat16": "bf16",
    "float16": "bf16",
    "float32": "fp32",
    "float8_e4m3fn": "fp8",
    "float8_e5m2": "fp8",
}

_LABELS = ("name", "title", "vendor", "kind", "topology", "device_kinds")
_FIGURES = (
    "devices_per_chip",
    "flops_per_s",
    "vector_flops_per_s",
    "hbm_bytes",
    "hbm_bytes_per_s",
    "links",
    "link_bytes_per_s",
    "collective_latency_s",
    "hop_latency_s",
    "call_overhead_s",
)
_OPTIONAL = ("vector_flops_per_s",)
_TIMES = ("collective_latency_s", "hop_latency_s", "call_overhead_s")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chip:
    """What one chip can do at most, and who says so.

    Attributes:
      name: as in `--chip=h100` and `--target=h100:8`.
      title: the full name of the part.
      vendor: who makes it.
      kind: one of `KINDS`.
      topology: one of `TOPOLOGIES`.
      device_kinds: what `jax.Device.device_kind` says on this chip.
      devices_per_chip: JAX devices that one chip shows.
      flops_per_s: peak of the matrix units for each dtype, dense.
      vector_flops_per_s: peak float32 rate outside the matrix units; None where
        nobody publishes one.
      hbm_bytes: memory a program can use.
      hbm_bytes_per_s: peak rate of that memory.
      links: links that leave the chip.
      link_bytes_per_s: of one link, in one direction.
      collective_latency_s: a collective of two devices with nothing to send.
      hop_latency_s: each further step of a collective over more devices.
      call_overhead_s: one call of a compiled program with nothing to do.
      sources: where each figure is from, e.g. under "hbm_bytes" and
        "flops_per_s.bf16".
      calibrated: what was measured on it, with date and versions; None where prices
        are made from the figures above.

    Raises:
      ValueError: a figure is not positive or has no source, or a label is unknown.
    """

    name: str
    title: str
    vendor: str
    kind: str
    topology: str
    device_kinds: tuple[str, ...]
    devices_per_chip: int
    flops_per_s: Mapping[str, float] = dataclasses.field(hash=False)
    vector_flops_per_s: float | None = None
    hbm_bytes: int
    hbm_bytes_per_s: float
    links: int
    link_bytes_per_s: float
    collective_latency_s: float
    hop_latency_s: float
    call_overhead_s: float
    sources: Mapping[str, str] = dataclasses.field(hash=False)
    calibrated: Calibration | None = None

    def __post_init__(self) -> None:
        for label, known in (("kind", KINDS), ("topology", TOPOLOGIES)):
            if getattr(self, label) not in known:
                raise ValueError(
                    f"chip {self.name!r} has {label}={getattr(self, label)!r};"
                    f" the known ones are {', '.join(known)}. Collectives are priced by"
                    f" how chips are wired, so write one of these."
                )
        for figure, value in self.figures().items():
            if math.isnan(value) or value < 0 or (value == 0 and figure not in _TIMES):
                raise ValueError(
                    f"chip {self.name!r} has {figure}={value:g}. Rates and sizes are"
                    " divided by, so they are above zero (only times may be zero)."
                    " Correct the figure in its file."
                )
            if not self.sources.get(figure, "").strip():
                raise ValueError(
                    f"chip {self.name!r} gives {figure}={value:g} without a source; its"
                    f" sources are {', '.join(sorted(self.sources)) or 'none'}. Every"
                    ' figure names where it is from. Add `source = "..."` below'
                    f" [{figure}]."
                )

    @property
    def rates_from(self) -> str:
        """Where prices on this chip come from, in words for a report.

        Example:
          >>> CHIPS["v5p"].rates_from
          'published peaks'
        """
        return str(self.calibrated or "published peaks")

    def published(self) -> "Chip":
        """Returns this chip without what was measured on it."""
        return dataclasses.replace(self, calibrated=None)

    def figures(self) -> dict[str, float]:
        """Returns every number of this chip under the name its source has."""
        figures: dict[str, float] = {}
        for name in _FIGURES:
            value = getattr(self, name)
            if isinstance(value, Mapping):
                figures |= {f"{name}.{key}": rate for key, rate in value.items()}
            elif value is not None:
                figures[name] = value
        return figures

    def matmul_flops_per_s(self, dtype: str) -> float:
        """Returns the peak matrix rate for `dtype`, e.g. "bf16" or "bfloat16".

        Raises:
          ValueError: this chip's file has no rate for it.
        """
        key = short_dtype(dtype)
        if key not in self.flops_per_s:
            raise ValueError(
                f"no matrix rate for dtype {dtype!r} on chip {self.name!r}, which has"
                f" {', '.join(self.flops_per_s)}. A rate is never guessed from another"
                " dtype's. Choose one of these, or add the rate to the chip's file."
            )
        return self.flops_per_s[key]

    def per_device(self) -> "Chip":
        """Returns the share of one JAX device: the chip itself where they are one.

        Devices on one chip split its rates and memory evenly, and each gets half
        (for two) of the rate of every link.
        """
        n = self.devices_per_chip
        if n == 1:
            return self
        vector = self.vector_flops_per_s
        return dataclasses.replace(
            self,
            devices_per_chip=1,
            flops_per_s={key: rate / n for key, rate in self.flops_per_s.items()},
            vector_flops_per_s=None if vector is None else vector / n,
            hbm_bytes=self.hbm_bytes // n,
            hbm_bytes_per_s=self.hbm_bytes_per_s / n,
            link_bytes_per_s=self.link_bytes_per_s / n,
        )


def short_dtype(dtype: str) -> str:
    """Returns the name of a dtype in chip files.

    Example:
      >>> short_dtype("bfloat16"), short_dtype("int8")
      ('bf16', 'int8')
    """
    return _DTYPES.get(dtype, dtype)


def load_chip(path: pathlib.Path | str) -> Chip:
    """Returns the chip described by a TOML file like those beside this module.

    Raises:
      ValueError: a key is unknown or missing, or `Chip` refuses a figure.
    """
    path = pathlib.Path(path)
    table = tomllib.loads(path.read_text(encoding="utf-8"))
    known = (*_LABELS, *_FIGURES)
    unknown = sorted(set(table) - set(known))
    missing = [k for k in known if k not in table and k not in _OPTIONAL]
    if unknown or missing:
        raise ValueError(
            f"cannot read chip file {path.name}: unknown keys"
            f" {', '.join(unknown) or 'none'}; missing keys"
            f" {', '.join(missing) or 'none'}. A chip file has exactly the keys"
            f" {', '.join(known)} ({', '.join(_OPTIONAL)} may be left out). Rename or"
            " add the keys named."
        )
    fields: dict[str, Any] = {label: table[label] for label in _LABELS}
    fields["device_kinds"] = tuple(fields["device_kinds"])
    sources: dict[str, str] = {}
    for name in _FIGURES:
        if name == "flops_per_s":
            rates = table[name]
            fields[name] = {
                dtype: float(_value(path, f"{name}.{dtype}", figure, sources))
                for dtype, figure in rates.items()
            }
        elif name in table:
            fields[name] = _value(path, name, table[name], sources)
    return Chip(sources=sources, **fields)


def _value(path: pathlib.Path, name: str, figure: Any, sources: dict[str, str]) -> Any:
    """Returns the value of one figure and files its source."""
    if not isinstance(figure, dict) or not set(figure) <= {"value", "source"}:
        raise ValueError(
            f"cannot read {name} in chip file {path.name}: found {figure!r}. A figure"
            f" is a table with `value` and `source` only. Write it as [{name}]."
        )
    value = figure.get("value")
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(
            f"cannot read {name} in chip file {path.name}: its value is {value!r}. A"
            " figure is a number in the unit its name ends with (bytes, seconds, per"
            " second). Write `value = 1.5e12`."
        )
    sources[name] = str(figure.get("source", ""))
    return value


def find_chip(name: str) -> Chip:
    """Returns the chip called `name`, or the one in the file `name`.

    A file ends in .toml, or in .jsonl: measurements of the chip that it names, which
    is a known one or in a file of that name beside it. `NAME@published` has none.

    Raises:
      ValueError: no such chip.
    """
    if name.endswith(_PUBLISHED):
        return find_chip(name.removesuffix(_PUBLISHED)).published()
    if name.endswith(".toml"):
        return load_chip(name)
    if name.endswith(".jsonl"):
        return load_calibrated(name)
    if name not in CHIPS:
        near = difflib.get_close_matches(name.lower(), CHIPS, n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise ValueError(
            f"no chip {name!r}: {hint}There are {', '.join(CHIPS)}. A chip is one of"
            " these or a file that ends in .toml or .jsonl. Choose one, or write a file"
            " like sharding/chips/h100.toml."
        )
    return CHIPS[name]


def load_calibrated(path: pathlib.Path | str) -> Chip:
    """Returns the chip that a file of measurements names, with these measurements.

    Raises:
      ValueError: the file is no calibration, or its chip is not known.
    """
    path = pathlib.Path(path)
    calibration = read_calibration(path)
    name = calibration.header.chip
    beside = path.with_name(f"{name}.toml")
    chip = load_chip(beside) if beside.is_file() else find_chip(name)
    return dataclasses.replace(chip, calibrated=calibration)


def _load_all() -> dict[str, Chip]:
    folder = pathlib.Path(__file__).parent
    found = {path.stem: load_chip(path) for path in sorted(folder.glob("*.toml"))}
    measured = {path.stem: load_calibrated(path) for path in folder.glob("*.jsonl")}
    return {chip.name: chip for chip in {**found, **measured}.values()}


_PUBLISHED = "@published"
CHIPS: Mapping[str, Chip] = _load_all()
