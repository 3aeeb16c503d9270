"""Reads the optimised HLO text of any JAX program. Needs nothing but the text.

read_ledger(text, axes) -> Ledger: FLOPs, HBM bytes, collectives by mesh axis and
loops, of one device for one call. read_module(text) -> Module for a closer look.
"""

from sharding.hlo.groups import AxisNamer as AxisNamer
from sharding.hlo.groups import parse_groups as parse_groups
from sharding.hlo.ledger import Collective as Collective
from sharding.hlo.ledger import Cost as Cost
from sharding.hlo.ledger import Ledger as Ledger
from sharding.hlo.ledger import Loop as Loop
from sharding.hlo.ledger import read_ledger as read_ledger
from sharding.hlo.reader import Computation as Computation
from sharding.hlo.reader import Instruction as Instruction
from sharding.hlo.reader import Module as Module
from sharding.hlo.reader import read_module as read_module
from sharding.hlo.shapes import Shape as Shape
from sharding.hlo.shapes import parse_shape as parse_shape
