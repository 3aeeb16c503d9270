"""Assertions on compiled programs, for anybody's test suite.

    compiled = jax.jit(step, donate_argnums=1).lower(params, cache).compile()
    assert_collectives(compiled, mesh, {"tensor": {"all-reduce": 2}})
    assert_donated(compiled)
    assert_memory_below(compiled, 16 * 1024**3)

A program may be anything that `analyze` takes, an `Analysis` too. Each raises
AssertionError with what was expected, what was found, and the lines of source.
"""

from collections.abc import Iterable, Mapping
from typing import Any

from sharding.hlo.analysis import Analysis, analyze
from sharding.hlo.opcodes import COLLECTIVES
from sharding.hlo.programs import Program, axis_sizes
from sharding.hlo.records import Collective
from sharding.hlo.render import figure_bytes
from sharding.hlo.tables import collectives as collectives_table
from sharding.hlo.tables import peak as peak_table

_KINDS = tuple(dict.fromkeys(COLLECTIVES.values()))

Axis = str | tuple[str, ...]
Counts = Mapping[Any, Mapping[str, int]]  # by Axis; a Mapping's keys are invariant


def assert_collectives(
    program: Program | Analysis,
    mesh: Any,
    expected: Counts,
    *,
    at_most: bool = False,
    ignore_below_bytes: int = 0,
) -> None:
    """Asserts how often each collective runs in one call, by mesh axis and kind.

    Loops are multiplied by their trip counts; of a loop whose length depends on data
    one iteration counts. What `expected` does not name must not happen.

    Args:
      program: see `analyze`.
      mesh: see `analyze`; for an `Analysis` it must be the one that it was made with.
      expected: {"tensor": {"all-reduce": 2}}; an axis is one, or several in any order,
        "data+tensor" or ("data", "tensor"), or a device set. Kinds are all-reduce,
        all-gather, reduce-scatter, all-to-all, permute and broadcast.
      at_most: fewer are fine too.
      ignore_below_bytes: leave out collectives of a smaller payload each, such as the
        sum of a loss.

    Raises:
      AssertionError: the counts differ.
      ValueError: an axis or a kind that there is none of.
    """
    analysis = _analysis(program, mesh)
    _check_kinds(kind for kinds in expected.values() for kind in kinds)
    rows = [
        row
        for row in analysis.ledger.collectives
        if row.payload_bytes_each >= ignore_below_bytes
    ]
    found: dict[tuple[str, str], int] = {}
    for row in rows:
        key = (row.axis, row.kind)
        found[key] = found.get(key, 0) + row.count
    wanted: dict[tuple[str, str], int] = {}
    for asked, kinds in expected.items():
        axis = _named(analysis, asked)
        for kind, number in kinds.items():
            wanted[axis, kind] = wanted.get((axis, kind), 0) + number
    wrong = []
    for key in dict.fromkeys([*wanted, *found]):
        want, have = wanted.get(key, 0), found.get(key, 0)
        if have > want or (have < want and not at_most):
            most = "at most " if at_most else ""
            wrong.append(
                (key, f"{key[1]} over {key[0]}: expected {most}{want}, found {have}")
            )
    if wrong:
        keys = {key for key, _ in wrong}
        guilty = [row for row in rows if (row.axis, row.kind) in keys]
        raise AssertionError(
            _message(
                f"collectives of {analysis.name} are not as expected:",
                [f"  {sentence}" for _, sentence in wrong],
                guilty,
            )
        )


def assert_no_collectives(
    program: Program | Analysis,
    mesh: Any = None,
    *,
    axis: Axis | None = None,
    kind: str | None = None,
    ignore_below_bytes: int = 0,
) -> None:
    """Asserts that nothing is sent: at all, along `axis`, or of `kind`.

    Args:
      program: see `analyze`.
      mesh: see `analyze`; needed to speak of an axis.
      axis: of the mesh; collectives over several axes at once count for each.
      kind: such as "all-gather".
      ignore_below_bytes: as in `assert_collectives`.

    Raises:
      AssertionError: something is sent.
      ValueError: an axis or a kind that there is none of.
    """
    analysis = _analysis(program, mesh)
    _check_kinds([kind] if kind else [])
    axis = _named(analysis, axis) if axis else None
    found = [
        row
        for row in analysis.ledger.collectives
        if row.payload_bytes_each >= ignore_below_bytes
        and (axis is None or axis == row.axis or axis in row.axis.split("+"))
        and (kind is None or kind == row.kind)
    ]
    if found:
        what = f"{kind or 'collective'}{f' over {axis}' if axis else ''}"
        count = sum(row.count for row in found)
        raise AssertionError(
            _message(f"{analysis.name} must have no {what}; it has {count}:", [], found)
        )


def assert_no_weight_gather(program: Program | Analysis, mesh: Any = None) -> None:
    """Asserts that no argument is gathered, directly or after reshape or convert.

    All-gathers of at least 1 % of the arguments' bytes count; see advice.py.

    Raises:
      AssertionError: one is.
    """
    analysis = _analysis(program, mesh)
    found = [a for a in analysis.advice if a.kind == "weight-gathered"]
    if found:
        lines = [f"  {a.what}: {a.evidence}{_at(a.source)}" for a in found]
        raise AssertionError(_message(f"{analysis.name} gathers arguments:", lines, []))


def assert_donated(
    program: Program | Analysis,
    argnums: int | Iterable[int] | None = None,
    *,
    fraction: float = 1.0,
) -> None:
    """Asserts that outputs take the place of donated arguments.

    Args:
      program: see `analyze`; a compiled function if `argnums` are given.
      argnums: positions of arguments of the function, each a tree; None: every
        argument that was donated, and at least one must be.
      fraction: least share of these arguments' bytes that is taken over.

    Raises:
      AssertionError: less is.
      ValueError: the program does not say which arguments these are.
    """
    analysis = _analysis(program, None)
    arguments = analysis.memory.arguments
    if argnums is None:
        asked = [a for a in arguments if a.is_donated]
        what = "donated arguments"
    else:
        numbers = _parameters(program, argnums, len(arguments))
        asked = [a for a in arguments if a.number in numbers]
        what = f"arguments {argnums}"
    total = sum(a.num_bytes for a in asked)
    taken = sum(a.aliased_bytes for a in asked)
    if not total or taken < fraction * total:
        lines = [
            f"  {a.name}, {a.shape}: {figure_bytes(a.aliased_bytes)} of"
            f" {figure_bytes(a.num_bytes)}"
            + ("" if a.is_donated is not False else "; it is not donated")
            for a in asked
            if a.aliased_bytes < a.num_bytes
        ]
        share = f"{figure_bytes(taken)} of {figure_bytes(total)}"
        raise AssertionError(
            _message(
                f"outputs of {analysis.name} must lie in {fraction:.0%} of the {what};"
                f" they lie in {share}:",
                lines or ["  nothing is donated; pass donate_argnums to jax.jit"],
                [],
            )
        )


def assert_memory_below(program: Program | Analysis, limit_bytes: int) -> None:
    """Asserts the most memory that one device holds in one call.

    The figure is the larger of ours and XLA's own, where XLA gives one.

    Args:
      program: see `analyze`.
      limit_bytes: of one device.

    Raises:
      AssertionError: it holds `limit_bytes` or more.
    """
    analysis = _analysis(program, None)
    memory = analysis.memory
    most = memory.peak_bytes
    if memory.xla is not None:
        most = max(most, memory.xla.total_bytes)
    if most >= limit_bytes:
        raise AssertionError(
            f"{analysis.name} holds {figure_bytes(most)} on one device, which must be"
            f" below {figure_bytes(limit_bytes)}: arguments"
            f" {figure_bytes(memory.argument_bytes)}, outputs"
            f" {figure_bytes(memory.output_bytes)} (of these"
            f" {figure_bytes(memory.alias_bytes)} in an argument's place), temporaries"
            f" {figure_bytes(memory.temporary_bytes)}.\n{peak_table(memory).text()}"
        )


def _analysis(program: Program | Analysis, mesh: Any) -> Analysis:
    if not isinstance(program, Analysis):
        return analyze(program, mesh)
    axes = axis_sizes(mesh)
    if axes is not None and axes != dict(program.axes):
        raise ValueError(
            f"mesh {axes} is not the mesh {dict(program.axes)} that {program.name} was"
            " analyzed with. Axes are named once, in analyze(). Pass mesh=None, or"
            " analyze again."
        )
    return program


def _check_kinds(kinds: Iterable[str]) -> None:
    for kind in kinds:
        if kind not in _KINDS:
            raise ValueError(
                f"no kind of collective {kind!r}; the kinds are {', '.join(_KINDS)}."
                " A name that matches nothing would pass silently. Choose one of these."
            )


def _named(analysis: Analysis, axis: Axis) -> str:
    """Returns an axis, or several in any order, as collectives name them."""
    if isinstance(axis, str):
        if axis in analysis.axes or axis.startswith("devices "):
            return axis
        axis = tuple(axis.split("+"))
    unknown = [name for name in axis if name not in analysis.axes]
    if unknown:
        raise ValueError(
            f"no mesh axis {unknown[0]!r}; {analysis.name} was read with"
            f" {dict(analysis.axes) or 'no mesh'}. An axis is one of the mesh, or"
            ' several, "data+tensor". Pass the mesh, or choose one of its axes.'
        )
    return "+".join(name for name in analysis.axes if name in axis)


def _parameters(
    program: Program | Analysis, argnums: int | Iterable[int], num_parameters: int
) -> frozenset[int]:
    """Returns the HLO parameters that the leaves of these arguments became."""
    import jax

    info = getattr(program, "args_info", None)
    if info is None:
        raise ValueError(
            f"argnums {argnums} of a {type(program).__name__} are not known: HLO has"
            " flat parameters. Pass the compiled function, or leave argnums out."
        )
    positions = [argnums] if isinstance(argnums, int) else list(argnums)
    args, kwargs = info
    missing = [k for k in positions if not 0 <= k < len(args)]
    if missing:
        raise ValueError(
            f"no argument {missing[0]}; the function was lowered with {len(args)}"
            " positional arguments. Count from 0, without keyword arguments."
        )
    owners = [k for k, arg in enumerate(args) for _ in jax.tree.leaves(arg)]
    owners += [-1] * len(jax.tree.leaves(kwargs))
    inner = getattr(getattr(program, "_executable", None), "unsafe_call", None)
    kept = getattr(inner, "kept_var_idx", None)
    if kept is not None:
        owners = [owners[k] for k in sorted(kept)]
    if len(owners) != num_parameters:
        raise ValueError(
            f"the function has {len(owners)} arrays, the program {num_parameters}"
            " parameters: JAX left some out that nothing reads, and does not say which."
            " Leave argnums out."
        )
    return frozenset(n for n, owner in enumerate(owners) if owner in positions)


def _at(source: str) -> str:
    return f" at {source}" if source else ""


def _message(head: str, lines: list[str], rows: list[Collective]) -> str:
    """Returns a message that ends with the collectives in question."""
    table = [collectives_table(rows).text()] if rows else []
    return "\n".join([head, *lines, *table])
