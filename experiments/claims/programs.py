"""Programs compiled once, and priced as many chips.

What a compiler makes for a described GPU does not depend on a chip's rates, so one
program answers for every chip, for links of other speeds, and for a chip with more
memory; `experiments.shelf` keeps what it does.
"""

import dataclasses

import jax

from experiments.claims.rows import ANY_MEMORY, LINKS, MEMORY
from experiments.report.record import Point
from experiments.shelf import Shelf
from sharding import choices
from sharding.chips import Chip, find_chip
from sharding.program import CompiledProgram, Program
from sharding.target import Target, parse_target

# Described to XLA:GPU, so that it never computes twice what it could keep. Whether a
# program fits is decided by its size, chip by chip.
_ROOM_BYTES = 10**14


def priced_as(chip: Chip, point: Point) -> Chip:
    """Returns the chip that prices `point`, with the links and memory it asks for.

    Links of another speed were never measured: then all rates are the published ones.
    """
    if LINKS in point.context:
        rate = chip.link_bytes_per_s * float(point.context[LINKS])
        chip = dataclasses.replace(chip.published(), link_bytes_per_s=rate)
    if point.context.get(MEMORY) == ANY_MEMORY:
        chip = dataclasses.replace(chip, hbm_bytes=_ROOM_BYTES)
    return chip


class Roomy(Shelf):
    """Compiles for GPUs with more memory than any program needs."""

    def target(self, point: Point) -> Target:
        own = find_chip(point.target.partition(":")[0])
        roomy = dataclasses.replace(own, hbm_bytes=_ROOM_BYTES)
        target = parse_target(point.target, roomy if own.kind == "gpu" else None)
        return dataclasses.replace(target, chip=priced_as(find_chip(point.chip), point))

    def choose(self, program: Program, target: Target, layers: str) -> Program:
        """Returns `program` with ticks written as on GPUs that are there.

        Of long prompts, the loop would copy as much cache as decode reads.
        """
        program = choices.choose(program, target, layers=layers)
        unroll = program.phase == "decode" and program.partition.stage > 1
        if unroll and program.layers == "unrolled":
            return dataclasses.replace(program, ticks="unrolled")
        return program

    def compile(self, program: Program, target: Target) -> CompiledProgram:
        compiled = super().compile(program, target)
        jax.clear_caches()  # else a long sweep keeps every trace
        return compiled
