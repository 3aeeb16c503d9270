"""The peer is asked for the same shapes, and its records are read like ours."""

import dataclasses
import importlib.util
from collections.abc import Callable

import numpy as np
import pytest

from experiments import peer as peer_lib
from experiments.peer import Peer
from experiments.report import tables
from experiments.report.record import Record
from jaxllm.config import PRESETS
from sharding.partition import Workload
from sharding.timing import Run
from tests import fakes

POINT = fakes.point(
    model="tiny", target="torch", chip="h100", partition="tp1", num_chips=1,
    num_devices=1, batch_size=2, input_len=6, output_len=5,
    context={"engine": "torch"},
)  # fmt: skip


class OutOfMemoryError(RuntimeError):
    """Stands for torch's."""


class FakeTorch:
    OutOfMemoryError = OutOfMemoryError


class FakePeer(Peer):
    """Takes 3 s for prefill and 0.5 s for a step, if its memory suffices."""

    available_bytes = property(lambda _: 100)
    memory_bytes = property(lambda _: (7, 9))
    device_name = property(lambda _: "NVIDIA H100 80GB HBM3")
    versions = property(lambda _: {"torch": "2"})

    def start_count(self) -> None:
        pass

    def runner(self, workload: Workload, seed: int = 0) -> Callable[[int], Run]:
        if workload.batch_size > 2:
            raise OutOfMemoryError("CUDA out of memory. Tried to allocate 77.00 GiB")
        return lambda calls: Run(
            ttft_s=3.0, e2e_s=3.0 + 0.5 * calls, tokens=np.zeros((2, 1))
        )


@pytest.fixture
def peer() -> Peer:
    return FakePeer(
        torch=FakeTorch, transformers=None, model=None, device="cuda", compiled=True
    )


def _measured(peer: Peer, **changes: object) -> Record:
    point = dataclasses.replace(POINT, **changes)
    return peer_lib.measure(peer, PRESETS["tiny"], point, 3, ["warned"])


def test_a_record_of_torch_is_whole(peer: Peer) -> None:
    r = _measured(peer)
    assert (r.status, r.origin, r.ttft_s, r.tpot_s) == ("ok", "measured", 3.0, 0.5)
    assert r.measurement is not None
    assert (r.measurement.engine, r.measurement.peak_bytes) == ("torch", 9)
    assert r.measurement.warnings == ("warned",)
    assert r.provenance.versions["torch"] == "2"
    assert 0 < r.require("tpot_limit_s") < 1e-3
    assert Record.from_json(r.to_json()) == r


def test_what_torch_has_no_memory_for_does_not_fit(peer: Peer) -> None:
    r = _measured(peer, batch_size=4)
    assert r.status == "does not fit"
    assert "Tried to allocate 77.00 GiB" in str(r.reason)


def test_ratio_to_ours_at_the_same_shape(peer: Peer) -> None:
    theirs = _measured(peer)
    figures = {"ttft_s": 1.5, "tpot_s": 0.2}
    ours = dataclasses.replace(theirs, partition="tp2", **figures)  # pyright: ignore
    other = dataclasses.replace(ours, input_len=7)
    _, rows = peer_lib.beside([theirs], [ours, other])
    assert rows == [
        ["2", "tp2", "1.50 s", "3.00 s", "2.00", "200 ms", "500 ms", "2.50"]
    ]
    assert tables.is_figure(rows[0][-1])


def test_every_size_is_handed_on() -> None:
    c = PRESETS["llama-3.1-8b"]
    found = peer_lib._hf_config(c)
    assert found["hidden_size"] == 4096
    assert found["intermediate_size"] == 14336
    assert found["num_key_value_heads"] == 8
    assert found["rope_parameters"] == {
        "rope_type": "llama3", "rope_theta": 500_000.0, "factor": 8.0,
        "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }  # fmt: skip


@pytest.mark.skipif(
    importlib.util.find_spec("torch") is not None, reason="torch is installed"
)
def test_without_torch_it_says_so() -> None:
    with pytest.raises(ModuleNotFoundError, match="torch is not installed"):
        Peer.make(PRESETS["tiny"], "float32", "cpu", False)
