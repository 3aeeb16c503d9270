"""How the times of a measured record were taken; its `measurement` field."""

import dataclasses
from collections.abc import Mapping


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
