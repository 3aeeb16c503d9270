"""Programs that are only compiled: full-size models, on machines that are not there.

What the optimised HLO holds is compared with closed forms: FLOPs, bytes, collectives
and memory of one device.
"""

import dataclasses
import functools
from collections import Counter

import pytest

from jaxllm import config as config_lib
from jaxllm.config import PRESETS
from jaxllm.model import Layers
from sharding.hlo import Ledger, analyze, read_ledger
from sharding.layout import Ticks
from sharding.limits import closed_form_flops, limit_s, work
from sharding.partition import Partition, Workload, check
from sharding.program import CompiledProgram, Phase, Program
from sharding.target import parse_target

# Target, model, partition, phase, layers.
FLOPS = [
    ("cpu:8", "llama-3.1-8b", "tp8", "decode", "scanned"),
    ("cpu:8", "llama-3.1-8b", "tp2_pp4", "prefill", "scanned"),
    ("cpu:8", "llama-3.1-405b", "pp8", "decode", "scanned"),
    ("cpu:8", "llama-3.1-70b", "dp2_tp4", "prefill", "scanned"),
    ("h100:8", "llama-3.1-8b", "tp8", "prefill", "scanned"),
    ("h100:8", "llama-3.1-8b", "dp2_tp4", "decode", "unrolled"),
    ("h100:8", "llama-3.1-70b", "pp8", "decode", "unrolled"),
    ("h100:8", "llama-3.1-70b", "tp4_pp2", "prefill", "scanned"),
    ("h100:8", "llama-3.1-405b", "tp2_pp4", "decode", "scanned"),
    ("v5p:2x2x2", "llama-3.1-8b", "tp4_pp2", "decode", "scanned"),
    ("v5p:2x2x2", "llama-3.1-70b", "tp8", "prefill", "scanned"),
    ("v5p:2x2x2", "llama-3.1-70b", "pp8", "prefill", "scanned"),
    # 2 x 8 chips: eight are too small for it.
    ("v5p:2x4x2", "llama-3.1-405b", "tp8_pp2", "decode", "scanned"),
]


@functools.cache
def compiled(
    target: str,
    model: str,
    name: str,
    phase: Phase,
    layers: Layers,
    batch: int = 16,
    rules: str = "megatron",
    ticks: Ticks = "scanned",
) -> tuple[Program, CompiledProgram, Ledger]:
    program = Program(
        phase=phase,
        config=config_lib.load(model),
        partition=Partition.parse(name, rules),
        workload=Workload(batch_size=batch, input_len=2048, output_len=128),
        layers=layers,
        ticks=ticks,
    )
    result = program.compile(parse_target(target))
    return program, result, read_ledger(result.text, program.partition.axes)


@pytest.mark.parametrize(
    ("target", "model", "name", "phase", "layers"), FLOPS, ids=map("-".join, FLOPS)
)
def test_flops_are_the_closed_form(
    target: str, model: str, name: str, phase: Phase, layers: Layers
) -> None:
    program, _, ledger = compiled(target, model, name, phase, layers)
    # Norms, rotary, softmax and sampling come on top.
    assert 1.0 <= ledger.flops / closed_form_flops(program) < 1.01


def test_a_short_last_layer_computes_and_sends_one_position() -> None:
    """Of two layers, so that the one of them that is whole shows beside it."""
    batch, length = 4, 1024
    config = dataclasses.replace(config_lib.load("llama-3.1-8b"), num_layers=2)
    program = Program(
        phase="prefill",
        config=config,
        partition=Partition.parse("tp2"),
        workload=Workload(batch_size=batch, input_len=length, output_len=128),
        last_layer="last",
    )
    compiled = program.compile(parse_target("h100:2"))
    ledger = read_ledger(compiled.text, program.partition.axes)
    assert 1.0 <= ledger.flops / closed_form_flops(program) < 1.01
    whole = dataclasses.replace(program, last_layer="all")
    heads = config.num_heads * config.head_dim
    products = 2 * batch * length * config.embed_dim * (heads + 3 * config.mlp_dim) / 2
    saved = closed_form_flops(whole) - closed_form_flops(program)
    attention = 4 * heads * batch * 3 * 512**2 / 2  # in pairs of blocks of 512
    assert saved == pytest.approx(products + attention, rel=2 / length)
    row = config.embed_dim * 2
    sums = sorted(
        c.payload_bytes
        for c in ledger.collectives
        if c.kind == "all-reduce" and c.payload_bytes >= batch * row
        for _ in range(c.count)
    )
    # The last layer's two are short; of the first, and of embedding, all positions.
    assert sums == [batch * row] * 2 + [batch * length * row] * 3


@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_scanned_and_unrolled_layers_do_the_same_work(phase: Phase) -> None:
    _, _, scanned = compiled("h100:8", "llama-3.1-8b", "tp8", phase, "scanned")
    _, _, unrolled = compiled("h100:8", "llama-3.1-8b", "tp8", phase, "unrolled")
    assert scanned.flops == pytest.approx(unrolled.flops, rel=0.005)
    count = [
        Counter({(c.axis, c.kind): c.count for c in ledger.collectives})
        for ledger in (scanned, unrolled)
    ]
    assert set(count[0]) == set(count[1])


@pytest.mark.parametrize(
    ("target", "name", "layers"),
    [
        ("h100:8", "tp8", "unrolled"),
        ("h100:8", "pp8", "unrolled"),
        ("v5p:2x2x2", "tp8", "scanned"),
        ("v5p:2x2x2", "tp4_pp2", "scanned"),
    ],
)
def test_decode_reads_weights_and_cache_once(
    target: str, name: str, layers: Layers
) -> None:
    program, result, ledger = compiled(
        target, "llama-3.1-70b", name, "decode", layers, 16
    )
    # `work` counts the cache at its mean length; the program reads all of it.
    least = work(program).hbm_bytes
    assert 1.0 <= ledger.hbm_bytes / least < 1.15
    kv = result.memory.kv_bytes
    assert result.memory.activations_bytes < 0.1 * kv
    # Donated: besides the cache, only tokens, counters and streams in flight.
    assert 0 <= result.alias_bytes - kv < 0.001 * kv


@pytest.mark.parametrize(("target", "name"), [("h100:2", "pp2"), ("h100:4", "tp2_pp2")])
def test_unrolled_ticks_read_the_cache_where_it_lies(target: str, name: str) -> None:
    """No second cache, and no slot of it copied, as a loop that picks one would."""
    scanned, unrolled = (
        compiled(
            target, "llama-3.1-8b", name, "decode", "unrolled", 64, "megatron", ticks
        )
        for ticks in ("scanned", "unrolled")
    )
    program, result, ledger = unrolled
    kv = result.memory.kv_bytes
    assert 0 <= result.alias_bytes - kv < 0.001 * kv
    assert result.memory.activations_bytes < 0.01 * kv
    # The copies of a loop: every slot read and written once more.
    assert scanned[2].hbm_bytes - ledger.hbm_bytes > 1.8 * kv
    assert ledger.flops == pytest.approx(scanned[2].flops, rel=0.001)
    assert ledger.flops / closed_form_flops(program) < 1.01
    counts: list[Counter[tuple[str, str]]] = [Counter(), Counter()]
    for counter, found in zip(counts, (scanned[2], ledger), strict=True):
        for row in found.collectives:
            counter[row.axis, row.kind] += row.count
    assert counts[0] == counts[1]


def test_a_pipelines_prefill_holds_one_cache() -> None:
    for ticks in ("scanned", "unrolled"):
        _, result, _ = compiled(
            "h100:8", "llama-3.1-70b", "pp8", "prefill", "unrolled", 64, "megatron",
            ticks,
        )  # fmt: skip
        kv = result.memory.kv_bytes
        assert 0 <= result.alias_bytes - kv < 0.001 * kv
        assert result.memory.activations_bytes < 0.2 * kv


@pytest.mark.parametrize(
    ("name", "layers", "ticks"),
    [
        ("tp2", "unrolled", "scanned"),
        ("pp2", "unrolled", "scanned"),
        ("pp2", "unrolled", "unrolled"),
        ("tp2_pp2", "unrolled", "unrolled"),
        ("tp2_pp2", "scanned", "scanned"),
    ],
)
def test_a_loop_over_prompts_holds_one_cache(
    name: str, layers: Layers, ticks: Ticks
) -> None:
    """Not another one in the order in which a projection makes keys."""
    partition, config = Partition.parse(name), config_lib.load("llama-3.1-8b")
    program = Program(
        phase="prefill",
        config=dataclasses.replace(config, num_layers=8),
        partition=partition,
        workload=Workload(batch_size=256, input_len=1024, output_len=128),
        layers=layers,
        ticks=ticks,
        attention="cudnn",
    )
    result = program.compile(parse_target(f"h100:{partition.num_devices}"))
    kv = result.memory.kv_bytes
    assert 0 <= result.alias_bytes - kv < 0.001 * kv
    assert result.memory.activations_bytes < 0.6 * kv
    advice = analyze(result.text, partition.axes).advice
    assert "cache-copied" not in {each.kind for each in advice}


def test_batch_1_decode_reads_weights_and_cache() -> None:
    program, result, ledger = compiled(
        "h100:8", "llama-3.1-70b", "tp8", "decode", "unrolled", 1
    )
    config = program.config
    # One row of the embedding table is read, not the table.
    table = config.vocab_size * config.embed_dim * 2 // 8
    held = result.memory.weights_bytes - table + result.memory.kv_bytes
    assert 1.0 <= ledger.hbm_bytes / held < 1.15


@pytest.mark.parametrize("target", ["h100:8", "v5p:2x2x2"])
def test_megatron_reduces_twice_a_layer(target: str) -> None:
    layers: Layers = "unrolled" if target.startswith("h") else "scanned"
    _, _, ledger = compiled(target, "llama-3.1-70b", "tp8", "decode", layers, 16)
    stream = 16 * 8192 * 2  # batch x width x bfloat16
    large = [c for c in ledger.collectives if c.payload_bytes_each == stream]
    # Two for each of 80 layers and one for the embedding.
    assert {(c.axis, c.kind) for c in large} == {("tensor", "all-reduce")}
    assert sum(c.count for c in large) == 2 * 80 + 1
    # Sampling: a score and a token a sequence and device.
    rest = [c for c in ledger.collectives if c.payload_bytes_each != stream]
    assert sum(c.count for c in rest) <= 2
    assert all(c.payload_bytes_each <= 8 * 16 * 8 for c in rest)


def test_stages_only_pass_on_and_sample() -> None:
    _, _, ledger = compiled("h100:8", "llama-3.1-70b", "pp8", "decode", "unrolled", 16)
    assert {c.axis for c in ledger.collectives} == {"stage"}
    counts: Counter[str] = Counter()
    for row in ledger.collectives:
        counts[row.kind] += row.count
        # Nothing larger than the residual stream of one group of 2 sequences.
        assert row.payload_bytes_each <= 2 * 8192 * 2
    # In each of 8 ticks: one hop; embedding and last stream are summed.
    assert counts["permute"] == 8
    assert counts["all-reduce"] == 16


@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_replicas_send_nothing(phase: Phase) -> None:
    _, _, ledger = compiled("cpu:8", "llama-3.1-70b", "dp2_tp4", phase, "scanned")
    assert {c.axis for c in ledger.collectives} == {"tensor"}


def test_sequence_rules_scatter_and_gather_instead_of_reducing() -> None:
    _, _, ledger = compiled(
        "h100:8", "llama-3.1-8b", "tp8", "prefill", "scanned", 16, "sequence"
    )
    counts: Counter[str] = Counter()
    for row in ledger.collectives:
        if row.payload_bytes_each > 2**20:
            counts[row.kind] += row.count
    micro_batches = 2
    assert counts["reduce-scatter"] >= 2 * 32 * micro_batches
    assert counts["all-gather"] >= 2 * 32 * micro_batches
    assert counts["all-reduce"] <= micro_batches  # the embedding


def test_kv_seq_splits_the_cache_beyond_the_heads() -> None:
    """16 devices share 8 key/value heads: copies under megatron, none under kv_seq."""
    config = PRESETS["llama-3.1-70b"]
    workload = Workload(batch_size=16, input_len=2048, output_len=128)
    sizes = {}
    for rules in ("megatron", "kv_seq"):
        partition = Partition.parse("tp16", rules)
        layout = Program(
            phase="decode", config=config, partition=partition, workload=workload
        ).layout
        sizes[rules] = layout.device_bytes(layout.named_state().cache)
    assert sizes["megatron"] == 2 * sizes["kv_seq"]
    assert sizes["kv_seq"] == config.cache_bytes(16 * 2176, 2) // 16


@pytest.mark.parametrize("phase", ["prefill", "decode"])
@pytest.mark.parametrize(
    ("target", "name", "layers", "ticks"),
    [
        ("h100:8", "tp8", "unrolled", "scanned"),
        ("h100:4", "tp2_pp2", "unrolled", "unrolled"),
        ("v5p:2x2x2", "tp8", "scanned", "scanned"),
    ],
)
def test_kv_seq_moves_no_cache(
    target: str, name: str, layers: Layers, ticks: Ticks, phase: Phase
) -> None:
    """Each device writes what is its own; a prompt's keys change hands once."""
    program, result, ledger = compiled(
        target, "llama-3.1-70b@2", name, phase, layers, 16, "kv_seq", ticks
    )
    config = program.config
    rows = 16 // program.layout.groups
    if phase == "decode":
        # Partial results of attention in float32, their maxima and sums, or the stream;
        # not 38 MB of keys.
        most = rows * config.num_heads * (config.head_dim + 2) * 4
        assert max(c.payload_bytes_each for c in ledger.collectives) <= most
        held = result.memory.weights_bytes + result.memory.kv_bytes
        assert result.memory.activations_bytes < held / 10
        return
    micro = 16 // program.prefill_micro_batches
    keys = micro * config.num_kv_heads * program.layout.cache_len * config.head_dim * 2
    for row in ledger.collectives:
        if row.kind != "all-reduce" and row.axis == "tensor":
            assert row.payload_bytes_each <= 2 * keys / program.partition.tensor, row


def test_no_collective_moves_weights() -> None:
    for name in ("tp8", "pp8"):
        _, _, ledger = compiled(
            "h100:8", "llama-3.1-70b", name, "decode", "unrolled", 16
        )
        smallest = 8192 * 1280 * 2  # fused query/key/value of one of 8 devices
        assert max(c.payload_bytes_each for c in ledger.collectives) < smallest / 10


def test_limit_of_a_full_pipeline_is_all_weights_at_one_device() -> None:
    program = Program(
        phase="decode",
        config=PRESETS["llama-3.1-8b"],
        partition=Partition.parse("pp2"),
        workload=Workload(batch_size=64, input_len=1024, output_len=128),
    )
    chip = parse_target("h100:2").chip
    # All weights but the embedding pass one memory in a round, and half the cache:
    # 15.0 GB + 64 sequences x 1088 tokens x 131,072 bytes / 2.
    config = program.config
    weights = 2 * (config.num_params - config.vocab_size * config.embed_dim)
    expected = (weights + 64 * 1088 * 131_072 / 2) / chip.hbm_bytes_per_s
    assert limit_s(program, chip) == pytest.approx(expected, rel=0.001)


@pytest.mark.parametrize(
    ("model", "name", "rules", "batch", "message"),
    [
        ("tiny", "dp2_tp4", "megatron", 1, r"batch 1 over data=2.*multiple of 2"),
        ("tiny", "tp3", "megatron", 6, r"8 query heads over 3.*divides 8"),
        ("smollm2-135m", "tp2", "megatron", 2, r"9 query heads over 2"),
        ("tiny", "pp16", "megatron", 16, r"16 stages for 9 layers"),
        ("tiny", "pp8", "megatron", 12, r"12 sequences.*8 groups.*multiple of 8"),
        ("tiny", "tp4", "two_d", 4, r"data degree 1.*dp2_tp4"),
        ("tiny", "tp4", "sequence", 4, r"prompt length 2047 into 4"),
        ("llama-3.1-8b", "tp3", "megatron", 4, r"32 query heads over 3"),
    ],
)
def test_what_cannot_work_is_refused_before_compiling(
    model: str, name: str, rules: str, batch: int, message: str
) -> None:
    workload = Workload(batch_size=batch, input_len=2047, output_len=2)
    with pytest.raises(ValueError, match=message):
        check(PRESETS[model], Partition.parse(name, rules), workload)


def test_a_partition_uses_the_whole_target() -> None:
    workload = Workload(batch_size=16, input_len=8, output_len=2)
    with pytest.raises(ValueError, match=r"tp16 .*needs 16 devices; h100:8 has 8"):
        check(
            PRESETS["llama-3.1-8b"],
            Partition.parse("tp16"),
            workload,
            num_devices=8,
            target="h100:8",
        )


@pytest.mark.parametrize("name", ["tp4tp2", "tp0", "ep8", "tp4-pp2", "tp2_tp4", ""])
def test_misspelt_partitions_say_how_to_write_one(name: str) -> None:
    with pytest.raises(ValueError, match="such as tp4_pp2"):
        Partition.parse(name)


def test_rules_are_total() -> None:
    table = {**Partition().rules.table}
    table["embbed"] = table.pop("embed")
    rules = type(Partition().rules)
    with pytest.raises(ValueError, match="missing or unknown: embbed, embed"):
        rules(name="typo", table=table)


@pytest.mark.parametrize(
    ("name", "batch", "micro_batches"),
    [
        ("tp2", 1, 1),
        ("tp2", 64, 4),  # of 16,384 tokens
        ("pp2", 1, 1),
        ("pp2", 16, 8),
        ("pp2", 64, 16),  # timed: 829 ms, and 832 with 32
        ("pp2", 256, 32),  # 3,142 ms, as with 64; 3,310 with 128
        ("pp8", 64, 32),
        ("pp8", 1024, 128),
    ],
)
def test_micro_batches_weigh_bubbles_against_overhead(
    name: str, batch: int, micro_batches: int
) -> None:
    program = Program(
        phase="prefill",
        config=PRESETS["llama-3.1-8b"],
        partition=Partition.parse(name),
        workload=Workload(batch_size=batch, input_len=1024, output_len=128),
    )
    assert program.prefill_micro_batches == micro_batches
    assert program.num_ticks == micro_batches + program.partition.stage - 1
