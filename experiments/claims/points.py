"""Which points the page is made of, those that most claims rest on first.

A job is the programs of one point and every chip that prices them. All are priced as
chips with any memory, so that a claim can be told from the memory it needs; `depth`
decides what fits.
"""

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path

from experiments.claims import depth
from experiments.claims.printed import (
    CASES,
    CHIPS,
    COMPILED_FOR,
    FIFTH,
    LONG_70B,
    LONG_405B,
    SHORT_70B,
    SHORT_405B,
    Case,
)
from experiments.claims.programs import Roomy
from experiments.claims.rows import ANY_MEMORY, LINKS, MEMORY
from experiments.evaluate import Ask, evaluate, plan
from experiments.report.record import Point, Record
from sharding.partition import Partition

SINGLE = ("tp8", "tp4", "tp2", "tp1", "tp4_pp2", "tp2_pp4", "pp8")
OTHERS = ("pp4", "pp2", "tp2_pp2")
BATCHES = (1, 32, 256, 512, 1024)
SWEPT_LINKS = (FIFTH, 0.5, 1.0, 2.0, 4.0)
MICRO_BATCHES = (8, 16, 32, 64)  # of 64 sequences over eight stages
SLICES = ("v5p:2x2x2", "tpu7x:2x2x1", "v6e:2x4")
WIDE = "v5p:2x2x4"  # sixteen chips: more than the eight key/value heads


@dataclasses.dataclass(frozen=True, kw_only=True)
class Spec:
    """A case under some partitions and batch sizes, multiplied out.

    Attributes:
      target: what is compiled for; None: as many GPUs as the partition has devices.
      links: rates to try, in times the chip's own; None: only its own.
      whole: whether every layer is compiled; else two shallow programs.
    """

    case: Case
    partitions: tuple[str, ...]
    batches: tuple[int, ...]
    rules: str = "megatron"
    micro_batches: tuple[int | None, ...] = (None,)
    links: tuple[float | None, ...] = (None,)
    target: str | None = None
    whole: bool = False


def specs() -> Iterator[Spec]:
    """Yields everything that is asked, in the order of its weight."""
    tensor = ("tp8", "tp4", "tp2")
    yield Spec(case=LONG_70B, partitions=(*tensor, "pp8", "tp4_pp2"), batches=(256,))
    yield Spec(
        case=LONG_405B, partitions=("tp8",), batches=(32,), links=(None, *SWEPT_LINKS)
    )
    yield Spec(case=LONG_405B, partitions=("tp4", "tp2", "tp1"), batches=(32,))
    yield Spec(case=LONG_405B, partitions=(*tensor, "tp4_pp2", "pp8"), batches=(256,))
    yield Spec(case=LONG_70B, partitions=("tp1",), batches=(1,))
    pipeline = ("pp8",)
    yield Spec(
        case=LONG_405B, partitions=pipeline, batches=(512,), links=(None, FIFTH, 1.0)
    )
    for case, batch in ((LONG_70B, 1024), (SHORT_70B, 1024), (SHORT_405B, 512)):
        yield Spec(case=case, partitions=pipeline, batches=(batch,))
        yield Spec(case=case, partitions=("tp1",), batches=(1,))
    yield Spec(case=LONG_405B, partitions=pipeline, batches=(4096,))
    yield Spec(case=LONG_405B, partitions=("tp1",), batches=(1,))
    yield Spec(
        case=LONG_70B, partitions=("tp8",), batches=(32,), links=(None, *SWEPT_LINKS)
    )
    yield Spec(
        case=LONG_70B, partitions=pipeline, batches=(512,), links=(None, FIFTH, 1.0)
    )
    yield Spec(case=LONG_70B, partitions=("tp8", "pp8"), batches=(256,), whole=True)
    yield Spec(case=LONG_70B, partitions=SINGLE, batches=(1, 32))
    yield Spec(case=LONG_405B, partitions=("tp8", "tp4_pp2", "pp8"), batches=(1, 512))
    for case in (LONG_70B, LONG_405B):
        yield Spec(case=case, partitions=("tp2_pp4",), batches=(32, 256))
    yield from _questions()
    for case in CASES:
        yield Spec(case=case, partitions=SINGLE, batches=BATCHES)
    for case in (LONG_70B, LONG_405B):
        yield Spec(case=case, partitions=OTHERS, batches=(32, 256))


def _questions() -> Iterator[Spec]:
    """Yields what the paper leaves out."""
    case = LONG_70B
    yield Spec(
        case=case, partitions=("pp8",), batches=(64,), micro_batches=MICRO_BATCHES
    )
    for rules, partition in (
        ("sequence", "tp8"), ("kv_seq", "tp8"), ("two_d", "dp2_tp4"),
    ):  # fmt: skip
        yield Spec(case=case, partitions=(partition,), batches=(32,), rules=rules)
    for target in SLICES:
        yield Spec(
            case=case,
            partitions=("tp8", "tp4_pp2", "pp8"),
            batches=(32,),
            target=target,
        )
    for rules in ("megatron", "kv_seq"):
        yield Spec(
            case=case, partitions=("tp16",), batches=(32,), rules=rules, target=WIDE
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """Points that share their programs, and the folder where those are kept."""

    points: tuple[Point, ...]
    folder: Path


@dataclasses.dataclass(frozen=True, kw_only=True)
class Question:
    """What `jobs` is asked: specs, and where programs are kept."""

    specs: tuple[Spec, ...]
    folder: Path


def targets(asked: Sequence[Spec]) -> list[str]:
    """Returns every target that `asked` is compiled for."""
    names = [spec.target or _gpus(name) for spec in asked for name in spec.partitions]
    return list(dict.fromkeys(names))


def _gpus(partition: str) -> str:
    return f"{COMPILED_FOR}:{Partition.parse(partition).num_devices}"


def jobs(question: Question) -> list[Job]:
    """Returns the jobs of `question` in its order, each once; in a worker process.

    Raises:
      ValueError: something that is asked cannot be.
    """
    found: dict[tuple[object, ...], dict[str, Point]] = {}
    for spec in question.specs:
        for partition, batch, micro_batches in itertools.product(
            spec.partitions, spec.batches, spec.micro_batches
        ):
            target = spec.target or _gpus(partition)
            chips = CHIPS if spec.target is None else (target.partition(":")[0],)
            model = spec.case.model
            models = (model,) if spec.whole else depth.shallow(model, partition)
            programs = (
                spec.case, partition, spec.rules, batch, micro_batches, target, models
            )  # fmt: skip
            points = found.setdefault(programs, {})
            for model, chip in itertools.product(models, chips):
                case = dataclasses.replace(spec.case, model=model)
                point = _point(
                    case, target, chip, partition, spec.rules, batch, micro_batches
                )
                for links in spec.links:
                    context = {**point.context, MEMORY: ANY_MEMORY}
                    if links is not None:
                        context[LINKS] = str(links)
                    asked = dataclasses.replace(point, context=context)
                    points[asked.key] = asked
    return [
        Job(points=tuple(points.values()), folder=question.folder)
        for points in found.values()
    ]


def _point(
    case: Case,
    target: str,
    chip: str,
    partition: str,
    rules: str,
    batch_size: int,
    micro_batches: int | None,
) -> Point:
    points, wrong = plan(
        Ask(
            models=(case.model,),
            targets=(target,),
            chip=chip,
            partitions=(partition,),
            rules=(rules,),
            batch_sizes=(batch_size,),
            input_len=case.input_len,
            output_len=case.output_len,
            micro_batches=(micro_batches,),
            weights=case.weights,
            kv=case.kv,
        )
    )
    if wrong:
        raise ValueError(" ".join(wrong))
    (point,) = points
    return point


def answer(job: Job) -> list[Record]:
    """Returns the records of every point of `job`."""
    compiler = Roomy(job.folder)
    return [evaluate(point, compiler) for point in job.points]
