"""How the times of a measured record were taken; its `measurement` field."""

import dataclasses
import os
from collections.abc import Mapping, Sequence
from typing import Any, Self

from sharding import timing
from sharding.timing import Timing

# Variables that change how programs run; those that change what is compiled are flags.
_SETTINGS = ("XLA_PYTHON_CLIENT_", "NCCL_")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Measurement:
    """How times were measured: every sample, and the state of the devices.

    Attributes:
      engine: what ran, "jaxllm" or "torch".
      devices: names of those used.
      driver: version of the devices' driver; null where there is none.
      calls: of the decode program in each run.
      warmup_samples_s: times of the runs before those counted.
      ttft_samples_s: of each counted run, in order.
      e2e_samples_s: likewise.
      tpot_samples_s: likewise; (E2E - TTFT) / (output tokens - 1).
      ttft_spread: interquartile range of the samples / their median.
      tpot_spread: likewise.
      ttft_drift: median of the later half of the samples / of the earlier half.
      tpot_drift: likewise.
      held_bytes: allocated on the fullest device between calls; null if unknown.
      peak_bytes: most ever allocated on it by this point; null if unknown.
      peak_reason: why `peak_bytes` is null; null if it is not.
      devices_before: what the devices did before the point.
      devices_busy: likewise, during a run that is not counted.
      devices_placed: which device a pipeline's stages ran on, and its pace beside the
        fastest one's; null where it makes no difference.
      settings: variables that change how programs run.
      warnings: why these times may not be trusted.
    """

    engine: str
    devices: tuple[str, ...]
    driver: str | None
    calls: int
    warmup_samples_s: tuple[float, ...]
    ttft_samples_s: tuple[float, ...]
    e2e_samples_s: tuple[float, ...]
    tpot_samples_s: tuple[float, ...]
    ttft_spread: float
    tpot_spread: float
    ttft_drift: float
    tpot_drift: float
    held_bytes: int | None
    peak_bytes: int | None
    peak_reason: str | None
    devices_before: tuple[str, ...]
    devices_busy: tuple[str, ...]
    settings: Mapping[str, str]
    warnings: tuple[str, ...]
    devices_placed: tuple[str, ...] | None = dataclasses.field(
        default=None, metadata={"added": True}
    )

    @classmethod
    def of(
        cls,
        found: Timing,
        *,
        warnings: Sequence[str],
        devices_busy: Sequence[str],
        **seen: Any,
    ) -> Self:
        """Returns what `found` says, with the state of the devices around it."""
        slowed = [text for text in devices_busy if "slowed by" in text]
        return cls(
            calls=found.calls,
            warmup_samples_s=found.warmup_samples_s,
            ttft_samples_s=found.ttft_samples_s,
            e2e_samples_s=found.e2e_samples_s,
            tpot_samples_s=found.tpot_samples_s,
            ttft_spread=timing.spread(found.ttft_samples_s),
            tpot_spread=timing.spread(found.tpot_samples_s),
            ttft_drift=timing.drift(found.ttft_samples_s),
            tpot_drift=timing.drift(found.tpot_samples_s),
            devices_busy=tuple(devices_busy),
            settings={
                name: value
                for name, value in sorted(os.environ.items())
                if name.startswith(_SETTINGS)
            },
            warnings=(*warnings, *found.warnings, *slowed),
            **seen,
        )
