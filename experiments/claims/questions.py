"""What the paper leaves out, asked of the same programs: one table a question."""

import dataclasses

from experiments.claims.accounting import account
from experiments.claims.points import MICRO_BATCHES, SLICES, SWEPT_LINKS, WIDE
from experiments.claims.printed import (
    CHIPS,
    COMPILED_FOR,
    LONG_70B,
    LONG_405B,
    Case,
)
from experiments.claims.rows import Row, Rows
from experiments.report import units
from experiments.report.tables import Table
from jaxllm import config as config_lib
from sharding.chips import CHIPS as CHIP_FILES
from sharding.partition import Partition

_POINT = ("chip", "partition", "rules", "batch", "TTFT", "TPOT", "tokens/s", "memory")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Answer:
    """A question, a sentence on its table, and the rows behind it."""

    question: str
    text: str
    table: Table
    rows: tuple[Row, ...] = ()


def answers(rows: Rows) -> list[Answer]:
    """Returns every further question with what rows say of it."""
    every = (
        few_layers,
        rule_tables, micro_batches, uneven_stages, links, wide_tensor, slices,
        pipelines_memory,
    )  # fmt: skip
    return [question(rows) for question in every]


def rule_tables(rows: Rows) -> Answer:
    """Compares the rule tables at equal work."""
    asked = (("megatron", "tp8"), ("sequence", "tp8"), ("kv_seq", "tp8"),
             ("two_d", "dp2_tp4"))  # fmt: skip
    found = [
        row
        for chip in CHIPS
        for rules, name in asked
        if (row := rows.timed(LONG_70B, chip, name, 32, rules=rules))
    ]
    return Answer(
        question="Is there a better way to split a layer than the paper's?",
        text="Eight devices share each layer; 32 long prompts of 70B.",
        table=(_POINT, [_cells(row) for row in found]),
        rows=tuple(found),
    )


def _cells(row: Row) -> list[str]:
    return [
        row.chip,
        row.partition,
        row.rules,
        f"{row.batch_size:,}",
        units.seconds(row.require("ttft_s")),
        units.seconds(row.require("tpot_s")),
        units.digits(row.node_tokens_per_s),
        units.bytes_(row.require("needed_bytes"))
        + ("" if row.memory == "own" else " †"),
    ]


def few_layers(rows: Rows) -> Answer:
    """What was carried from shallow programs, beside programs compiled whole."""
    body, used = [], []
    for whole in rows.all:
        if not whole.whole or whole.origin == "measured" or not whole.ok:
            continue
        carried = next(
            (row for row in rows.all if row.ok and row.twin == whole.twin != row),
            None,
        )
        if carried is None or carried.whole:
            continue
        used += [whole, carried]
        body.append(
            [
                whole.chip,
                whole.partition,
                f"{whole.batch_size:,}",
                *(
                    text
                    for name in ("ttft_s", "tpot_s", "needed_bytes")
                    for text in _beside(carried.require(name), whole.require(name))
                ),
            ]
        )
    return Answer(
        question="Are programs of a few layers enough?",
        text="Every row but these is carried from two shallow programs to the model's"
        " depth. Here the same points were also compiled with every layer.",
        table=(
            (
                "chip",
                "partition",
                "batch",
                "TTFT, carried",
                "off by",
                "TPOT, carried",
                "off by",
                "memory, carried",
                "off by",
            ),
            body,
        ),
        rows=tuple(used),
    )


def _beside(carried: float, whole: float) -> list[str]:
    say = units.bytes_ if carried > 1e6 else units.seconds
    return [say(carried), f"{100 * (carried / whole - 1):+.4f} %"]


def micro_batches(rows: Rows) -> Answer:
    """How the bubble and the repeated reading of weights trade."""
    found = [
        row
        for chip in CHIPS
        for count in MICRO_BATCHES
        if (row := rows.timed(LONG_70B, chip, "pp8", 64, micro_batches=count))
    ]
    return Answer(
        question="Into how many micro-batches should a pipeline's prefill be cut?",
        text="pp8, 64 long prompts of 70B. Bubble: idle ticks, (p - 1) of M + p - 1.",
        table=(
            ("chip", "micro-batches", "TTFT", "bubble", "closed form", "temporaries"),
            [
                [
                    row.chip,
                    f"{row.asked_micro_batches}",
                    units.seconds(row.require("ttft_s")),
                    units.percent(row.share("ttft", "bubble")),
                    units.percent(7 / ((row.asked_micro_batches or 1) + 7)),
                    units.bytes_(row.prefill.activations_bytes if row.prefill else 0),
                ]
                for row in found
            ],
        ),
        rows=tuple(found),
    )


def uneven_stages(rows: Rows) -> Answer:
    """What 126 layers over four or eight stages cost."""
    config = config_lib.load(LONG_405B.model)
    body = []
    used: list[Row] = []
    for name in ("pp2", "pp4", "pp8"):
        partition = Partition.parse(name)
        counts = partition.stage_layers(config)
        run = max(counts) * partition.stage
        row = next(
            (r for chip in CHIPS if (r := rows.timed(LONG_405B, chip, name, 256))), None
        )
        used += [row] if row else []
        body.append(
            [
                name,
                f"{max(counts)} or {min(counts)}"
                if max(counts) != min(counts)
                else f"{counts[0]}",
                f"{run - config.num_layers}",
                units.percent(run / config.num_layers - 1),
                units.bytes_(row.decode.weights_bytes) if row and row.decode else "",
                units.bytes_(
                    account(LONG_405B, CHIP_FILES[COMPILED_FOR], name).weights_bytes
                ),
            ]
        )
    return Answer(
        question="What do uneven stages cost?",
        text="405B has 126 layers. A shorter stage is filled up with layers of zeros,"
        " which are computed: never more than one layer a stage.",
        table=(
            (
                "partition",
                "layers a stage",
                "of zeros",
                "more work",
                "weights of a device",
                "closed form, even",
            ),
            body,
        ),
        rows=tuple(used),
    )


def links(rows: Rows) -> Answer:
    """What faster and slower links would do, at published rates."""
    body, used = [], []
    for case in (LONG_70B, LONG_405B):
        for chip in CHIPS:
            series = [
                rows.timed(case, chip, "tp8", 32, links=times) for times in SWEPT_LINKS
            ]
            known = [row for row in series if row is not None]
            if len(known) < len(series):
                continue
            used += known
            body.append(
                [case.name, chip]
                + [units.seconds(row.require("ttft_s")) for row in known]
                + [units.seconds(row.require("tpot_s")) for row in known[::4]]
            )
    return Answer(
        question="What would other links do?",
        text="tp8 at batch 32, one program priced with links of other rates.",
        table=(
            (
                "case",
                "chip",
                *(f"TTFT x {times:g}" for times in SWEPT_LINKS),
                f"TPOT x {SWEPT_LINKS[0]:g}",
                f"TPOT x {SWEPT_LINKS[-1]:g}",
            ),
            body,
        ),
        rows=tuple(used),
    )


def wide_tensor(rows: Rows) -> Answer:
    """More tensor devices than key/value heads."""
    chip = WIDE.partition(":")[0]
    found = [
        row
        for rules in ("megatron", "kv_seq")
        if (row := rows.timed(LONG_70B, chip, "tp16", 32, rules=rules))
    ]
    return Answer(
        question="What if more devices share a layer than it has key/value heads?",
        text=f"70B has 8 of them; 16 chips, {WIDE}. Each head's cache stands on two"
        " devices (megatron), or is split over positions (kv_seq).",
        table=((*_POINT, "KV of a device"), [[*_cells(r), _kv(r)] for r in found]),
        rows=tuple(found),
    )


def _kv(row: Row) -> str:
    return units.bytes_(row.decode.kv_bytes) if row.decode else ""


def slices(rows: Rows) -> Answer:
    """TPU slices beside the GPU nodes."""
    found = [
        row
        for chip in (*CHIPS, *(name.partition(":")[0] for name in SLICES))
        for name in ("tp8", "tp4_pp2", "pp8")
        if (row := rows.timed(LONG_70B, chip, name, 32))
    ]
    return Answer(
        question="And on TPU slices?",
        text="Eight chips, or four TPU7x of two devices each, beside the nodes of eight"
        " GPUs; 32 long prompts of 70B. tokens/s are of eight chips. No prices are"
        " compared: what a chip costs is not in its file.",
        table=(
            (*_POINT, "chips"),
            [[*_cells(row), f"{row.num_chips}"] for row in found],
        ),
        rows=tuple(found),
    )


def pipelines_memory(rows: Rows) -> Answer:
    """The accounting of full pipelines, closed form beside the compiled program."""
    body, used = [], []
    for case in (LONG_70B, LONG_405B):
        for name in ("tp1", "tp8", "tp4_pp2", "pp8"):
            for chip in CHIPS:
                body.append(_account(rows, case, chip, name, used))
    return Answer(
        question="What does a full pipeline hold?",
        text="A device's memory with every group in flight: eight devices hold as many"
        " sequences under any partition that uses all of them. Closed form beside the"
        " largest batch compiled that fits.",
        table=(
            (
                "case",
                "partition",
                "chip",
                "weights",
                "KV of a sequence",
                "sequences",
                "a group",
                "compiled batch",
                "KV, closed form",
                "KV, compiled",
                "all, compiled",
            ),
            body,
        ),
        rows=tuple(used),
    )


def _account(
    rows: Rows, case: Case, chip: str, name: str, used: list[Row]
) -> list[str]:
    found = account(case, CHIP_FILES[chip], name)
    batch = max(rows.batches(case, chip, name), default=0)
    row = rows.get(case, chip, name, batch)
    compiled = ["", "", "", ""]
    if row is not None and row.decode is not None:
        used.append(row)
        compiled = [
            f"{batch:,}",
            units.bytes_(found.sequence_bytes * batch),
            units.bytes_(row.decode.kv_bytes),
            units.bytes_(row.require("needed_bytes")),
        ]
    return [
        case.name,
        name,
        chip,
        units.bytes_(found.weights_bytes),
        units.bytes_(found.sequence_bytes),
        f"{found.sequences:,}",
        f"{found.group:,}",
        *compiled,
    ]
