"""A chip is a file of figures, and no figure goes without its source."""

import pathlib
import re

import pytest

from sharding import chips
from sharding.chips import CHIPS, find_chip, load_chip

FOLDER = pathlib.Path(chips.__file__).parent
NAMES = [
    *("h100", "h200", "v4", "v5e", "v5p", "v6e", "tpu7x"),
    *("a100", "b200", "mi300x", "mi325x", "mi355x", "cpu"),
]


def _edited(tmp_path: pathlib.Path, old: str, new: str) -> pathlib.Path:
    """Returns a copy of h100.toml with one text replaced."""
    text = (FOLDER / "h100.toml").read_text()
    assert text.count(old) == 1
    path = tmp_path / "mine.toml"
    path.write_text(text.replace(old, new))
    return path


def test_every_chip_of_the_project_is_there() -> None:
    assert sorted(CHIPS) == sorted(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_chip_is_plausible(name: str) -> None:
    chip = CHIPS[name]
    assert chip.name == name
    for source in chip.sources.values():
        assert re.search(r"https?://|measured|assumed|arXiv|one |2 x H", source), source
    if name != "cpu":
        # Dense bf16 of these generations, and no unit slipped by a thousand.
        assert 150e12 < chip.flops_per_s["bf16"] < 3e15
        assert 15e9 < chip.hbm_bytes < 310e9
        assert 0.8e12 < chip.hbm_bytes_per_s < 8.1e12
        assert 150e9 < chip.links * chip.link_bytes_per_s < 1e12
        assert 1e-6 < chip.collective_latency_s < 50e-6
    for wide, narrow in (("bf16", "fp8"), ("bf16", "int8"), ("fp32", "bf16")):
        if narrow in chip.flops_per_s:
            assert chip.flops_per_s[wide] <= chip.flops_per_s[narrow]


def test_cpu_says_that_it_means_nothing() -> None:
    assert "not meaningful" in CHIPS["cpu"].title


@pytest.mark.parametrize(
    ("name", "both_ways_bytes_per_s"),
    # As vendors print them: both directions of all links together.
    [("h100", 900e9), ("a100", 600e9), ("b200", 1800e9), ("mi300x", 896e9),
     ("v5e", 400e9), ("v5p", 1200e9), ("v6e", 800e9), ("tpu7x", 1200e9)],
)  # fmt: skip
def test_links_add_up_to_the_datasheet(name: str, both_ways_bytes_per_s: float) -> None:
    chip = CHIPS[name]
    assert 2 * chip.links * chip.link_bytes_per_s == both_ways_bytes_per_s


def test_h100_peak_is_what_its_units_can_do() -> None:
    """132 cores of 4 matrix units, each 1024 FLOP a clock, as its description says."""
    text = (FOLDER / "h100.pbtxt").read_text()
    clocks = {float(c) for c in re.findall(r"clock_rate_ghz: (1\.8\d+)", text)}
    assert "core_count: 132" in text
    peak = 132 * 4 * 1024 * clocks.pop() * 1e9
    assert CHIPS["h100"].flops_per_s["bf16"] == pytest.approx(peak, rel=1e-3)


@pytest.mark.parametrize("name", ["h100", "h200"])
def test_memory_is_what_the_driver_reports(name: str) -> None:
    text = (FOLDER / f"{name}.pbtxt").read_text()
    assert f"device_memory_size: {CHIPS[name].hbm_bytes}\n" in text


def test_two_devices_share_a_tpu7x() -> None:
    chip, device = CHIPS["tpu7x"], CHIPS["tpu7x"].per_device()
    assert (chip.devices_per_chip, device.devices_per_chip) == (2, 1)
    assert 2 * device.flops_per_s["fp8"] == chip.flops_per_s["fp8"] == 4614e12
    assert 2 * device.hbm_bytes_per_s == chip.hbm_bytes_per_s
    assert 2 * device.hbm_bytes == chip.hbm_bytes
    assert 2 * device.link_bytes_per_s == chip.link_bytes_per_s
    assert device.per_device() is device
    assert CHIPS["v4"].per_device() is CHIPS["v4"]


@pytest.mark.parametrize(
    ("dtype", "rate"),
    [("bf16", 989.4e12), ("bfloat16", 989.4e12), ("float32", 494.7e12),
     ("float8_e4m3fn", 1978.9e12), ("int8", 1978.9e12)],
)  # fmt: skip
def test_rate_of_a_dtype(dtype: str, rate: float) -> None:
    assert CHIPS["h100"].matmul_flops_per_s(dtype) == rate


def test_no_rate_is_guessed() -> None:
    with pytest.raises(ValueError, match=r"'fp8' on chip 'a100', which has bf16, int8"):
        CHIPS["a100"].matmul_flops_per_s("fp8")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("value = 3.35e12", "value = 0", r"hbm_bytes_per_s=0\. Rates"),
        ("value = 3.35e12", "value = -2", r"hbm_bytes_per_s=-2\. Rates"),
        ("value = 3.35e12", "value = true", r"hbm_bytes_per_s .* value is True"),
        ("value = 66.9e12\nsource =", "value = 66.9e12\n# ", r"=6.69e\+13 without a s"),
        ("value = 66.9e12\nsource", "value = 66.9e12\nsorce", r"vector_flops_per_s .*"),
        ("[hbm_bytes]", "[hbm_byte]", r"unknown keys hbm_byte; missing keys hbm_bytes"),
        ('"switch"', '"hypercube"', r"topology='hypercube'; the known ones are switch"),
        ('kind = "gpu"', 'kind = "npu"', r"kind='npu'; the known ones are gpu, tpu"),
    ],
)
def test_wrong_file_is_refused(
    tmp_path: pathlib.Path, old: str, new: str, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        load_chip(_edited(tmp_path, old, new))


def test_own_file_is_a_chip(tmp_path: pathlib.Path) -> None:
    mine = find_chip(str(_edited(tmp_path, "value = 3.35e12", "value = 9e12")))
    assert mine.hbm_bytes_per_s == 9e12


def test_typo_gets_the_near_name() -> None:
    with pytest.raises(ValueError, match=r"no chip 'mi325': did you mean mi325x\?"):
        find_chip("mi325")
