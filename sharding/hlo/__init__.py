"""Reads the optimised HLO of any JAX program. Needs nothing but the text.

analyze(compiled) -> Analysis: FLOPs, bytes, collectives by mesh axis, memory and the
buffers at its peak, time bounds and advice, of one device for one call.
compare(before, after) -> Difference; assert_collectives(...) and friends for tests.
read_ledger(text, axes) -> Ledger, the first three; read_module(text) -> Module for a
closer look. See docs/inspecting.md.
"""

from sharding.hlo.advice import Advice as Advice
from sharding.hlo.analysis import Analysis as Analysis
from sharding.hlo.analysis import analyze as analyze
from sharding.hlo.diff import Difference as Difference
from sharding.hlo.diff import compare as compare
from sharding.hlo.expect import assert_collectives as assert_collectives
from sharding.hlo.expect import assert_donated as assert_donated
from sharding.hlo.expect import assert_memory_below as assert_memory_below
from sharding.hlo.expect import assert_no_collectives as assert_no_collectives
from sharding.hlo.expect import assert_no_weight_gather as assert_no_weight_gather
from sharding.hlo.groups import AxisNamer as AxisNamer
from sharding.hlo.groups import parse_groups as parse_groups
from sharding.hlo.ledger import Collective as Collective
from sharding.hlo.ledger import Cost as Cost
from sharding.hlo.ledger import Ledger as Ledger
from sharding.hlo.ledger import Loop as Loop
from sharding.hlo.ledger import read_ledger as read_ledger
from sharding.hlo.memory import Argument as Argument
from sharding.hlo.memory import Buffer as Buffer
from sharding.hlo.memory import Memory as Memory
from sharding.hlo.memory import XlaMemory as XlaMemory
from sharding.hlo.reader import Computation as Computation
from sharding.hlo.reader import Instruction as Instruction
from sharding.hlo.reader import Module as Module
from sharding.hlo.reader import read_module as read_module
from sharding.hlo.roofline import Bound as Bound
from sharding.hlo.roofline import Rates as Rates
from sharding.hlo.roofline import Roofline as Roofline
from sharding.hlo.shapes import Shape as Shape
from sharding.hlo.shapes import parse_shape as parse_shape
