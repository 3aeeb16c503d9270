"""Figures as people read them: three significant digits and a unit.

Bytes are decimal (1 GB = 1e9 bytes), as chip makers and links count them.
"""

_STEPS = (
    (1,),
    (1, 2, 5),
    (1, 1.5, 2, 3, 4, 5, 6, 8),
    (1, 1.2, 1.5, 1.8, 2, 2.5, 3, 3.5, 4, 4.5, 5, 6, 7, 8, 9),
)
_SECONDS = ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs"), (1e-9, "ns"))
_BYTES = ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB"), (1.0, "B"))
_COUNTS = ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"), (1.0, ""))


def digits(value: float) -> str:
    """Returns `value` with three significant digits, thousands separated.

    Example:
      >>> digits(0.012345), digits(12345), digits(99.96), digits(7)
      ('0.0123', '12,345', '100', '7.00')
    """
    if value == 0:
        return "0"
    # Formatting rounds first, so that 99.96 counts as 1.00e2.
    exponent = int(f"{value:.2e}".partition("e")[2])
    return f"{value:,.{max(2 - exponent, 0)}f}"


def tick(value: float, *, short: bool = False) -> str:
    """Returns the name of a round value on an axis; of a long axis `short` ones.

    Example:
      >>> tick(0.5), tick(20.0), tick(5000.0), tick(5000.0, short=True)
      ('0.5', '20', '5,000', '5 k')
    """
    if short:
        size, name = next((s for s in _COUNTS if value >= s[0]), (1.0, ""))
        return f"{value / size:g} {name}".strip()
    return f"{value:,.10g}"


def ticks(low: float, high: float) -> list[float]:
    """Returns round values between two, for a logarithmic axis; about 4 to 9.

    Example:
      >>> ticks(3, 60), ticks(1.5, 25)
      ([5.0, 10.0, 20.0, 50.0], [2.0, 5.0, 10.0, 20.0])
    """
    found: list[float] = []
    for steps in _STEPS:
        found = [m * 10.0**e for e in range(-12, 16) for m in steps]
        found = [tick for tick in found if low <= tick <= high]
        if len(found) >= 4:
            break
    return found


def seconds(value: float) -> str:
    """Example: `seconds(0.00984)` is "9.84 ms"."""
    return _scaled(value, _SECONDS)


def bytes_(value: float) -> str:
    """Example: `bytes_(141_107_412_992)` is "141 GB"."""
    return _scaled(value, _BYTES)


def count(value: float) -> str:
    """Example: `count(1.5e12)` is "1.5 T", used for FLOPs."""
    return _scaled(value, _COUNTS)


def percent(fraction: float) -> str:
    """Example: `percent(0.853)` is "85 %", `percent(0.0853)` is "8.5 %"."""
    value = 100 * fraction
    return f"{value:.1f} %" if value < 10 else f"{value:.0f} %"


def _scaled(value: float, scales: tuple[tuple[float, str], ...]) -> str:
    if value == 0:
        return f"0 {scales[-1][1] if scales is not _SECONDS else 's'}".strip()
    for size, name in scales:
        # 999.6 of a unit would be printed as 1,000 of it.
        if abs(value) >= 0.9995 * size:
            return f"{digits(value / size)} {name}".strip()
    return f"{digits(value / scales[-1][0])} {scales[-1][1]}".strip()
