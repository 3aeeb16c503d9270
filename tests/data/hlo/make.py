"""Makes the HLO files beside it: small programs, compiled for absent devices too.

    python tests/data/hlo/make.py v5p:2x2x2 decode   # writes decode.v5p.jax0.12.hlo

Sizes are all different, so that a transposed axis cannot hide.
"""

import functools
import os
import pathlib
import re
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from sharding.target import parse_target, prepare_environment

HERE = pathlib.Path(__file__).resolve().parent
D, F, LAYERS, BATCH, CACHE = 512, 1536, 5, 16, 640
HEADS, KV_HEADS, HEAD_DIM, VOCAB = 16, 8, 64, 4096

BF16 = jnp.bfloat16

Made = tuple[Callable[..., Any], tuple[Any, ...], tuple[int, ...]]


def _abstract(
    mesh: Mesh, shape: tuple[int, ...], *spec: Any, dtype: Any = jnp.bfloat16
):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, P(*spec)))


def _norm(x: jax.Array) -> jax.Array:
    wide = x.astype(jnp.float32)
    scale = lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + 1e-5)
    return (wide * scale).astype(x.dtype)


def _block(place, x, weights, keys, values, position):
    qkv = jnp.einsum("BD,DKGH->BKGH", _norm(x), weights["qkv"])
    group = HEADS // KV_HEADS
    q, k, v = qkv[:, :, :group], qkv[:, :, group], qkv[:, :, group + 1]
    keys = lax.dynamic_update_slice(keys, k[:, :, None], (0, 0, position, 0))
    values = lax.dynamic_update_slice(values, v[:, :, None], (0, 0, position, 0))
    scores = jnp.einsum("BKGH,BKSH->BKGS", q, keys).astype(jnp.float32)
    scores = jnp.where(jnp.arange(CACHE) <= position, scores, -1e30)
    probabilities = jax.nn.softmax(scores, axis=-1).astype(x.dtype)
    mixed = jnp.einsum("BKGS,BKSH->BKGH", probabilities, values)
    x = place(x + jnp.einsum("BKGH,KGHD->BD", mixed, weights["out"]))
    gate_up = jnp.einsum("BD,DCF->BCF", _norm(x), weights["gate_up"])
    hidden = jax.nn.silu(gate_up[:, 0]) * gate_up[:, 1]
    return place(x + jnp.einsum("BF,FD->BD", hidden, weights["down"])), keys, values


def _layer_weights(mesh: Mesh, lead: tuple[int, ...] = ()) -> dict[str, Any]:
    none, group = (None,) * len(lead), HEADS // KV_HEADS
    shapes = {
        "qkv": ((D, KV_HEADS, group + 2, HEAD_DIM), (None, "tensor")),
        "out": ((KV_HEADS, group, HEAD_DIM, D), ("tensor",)),
        "gate_up": ((D, 2, F), (None, None, "tensor")),
        "down": ((F, D), ("tensor",)),
    }
    return {
        name: _abstract(mesh, lead + shape, *none, *spec)
        for name, (shape, spec) in shapes.items()
    }


def decode(mesh: Mesh) -> Made:
    """One token through one layer that owns its donated cache."""

    def step(x, position, layers, caches):
        place = lambda y: lax.with_sharding_constraint(y, NamedSharding(mesh, P()))
        updated = []
        for weights, (keys, values) in zip(layers, caches, strict=True):
            x, keys, values = _block(place, x, weights, keys, values, position)
            updated.append((keys, values))
        return x, updated

    cache = _abstract(mesh, (BATCH, KV_HEADS, CACHE, HEAD_DIM), None, "tensor")
    return (
        step,
        (
            _abstract(mesh, (BATCH, D)),
            _abstract(mesh, (), dtype=jnp.int32),
            [_layer_weights(mesh)],
            [(cache, cache)],
        ),
        (3,),
    )


def scan(mesh: Mesh) -> Made:
    """The same for LAYERS, scanned over stacked weights, their cache carried along."""

    def step(x, position, layers, keys, values):
        place = lambda y: lax.with_sharding_constraint(y, NamedSharding(mesh, P()))

        def body(carry, item):
            x, keys, values = carry
            weights, i = item
            x, k, v = _block(place, x, weights, keys[i], values[i], position)
            return (
                x,
                lax.dynamic_update_index_in_dim(keys, k, i, 0),
                lax.dynamic_update_index_in_dim(values, v, i, 0),
            ), None

        carry, _ = lax.scan(body, (x, keys, values), (layers, jnp.arange(LAYERS)))
        return carry

    cache = _abstract(
        mesh, (LAYERS, BATCH, KV_HEADS, CACHE, HEAD_DIM), None, None, "tensor"
    )
    return (
        step,
        (
            _abstract(mesh, (BATCH, D)),
            _abstract(mesh, (), dtype=jnp.int32),
            _layer_weights(mesh, (LAYERS,)),
            cache,
            cache,
        ),
        (3, 4),
    )


def pipeline(mesh: Mesh) -> Made:
    """Micro-batches through stages that hand on by ppermute."""
    stages, count = mesh.shape["stage"], 6

    @functools.partial(
        jax.shard_map,
        mesh=mesh,
        in_specs=(P(), P("stage", None, "tensor"), P("stage", "tensor")),
        out_specs=P(),
        check_vma=False,
    )
    def run(x, up, down):
        stage = lax.axis_index("stage")

        def tick(t, carry):
            held, done = carry
            held = jnp.where(stage == 0, x[jnp.minimum(t, count - 1)], held)
            partial = jax.nn.relu(held @ up[0]) @ down[0]
            held = held + lax.psum(partial, "tensor")
            done = lax.dynamic_update_index_in_dim(
                done, held, jnp.maximum(t - stages + 1, 0), 0
            )
            ring = [(i, (i + 1) % stages) for i in range(stages)]
            return lax.ppermute(held, "stage", ring), done

        carry = (jnp.zeros_like(x[0]), jnp.zeros_like(x))
        _, done = lax.fori_loop(0, count + stages - 1, tick, carry)
        return lax.psum(jnp.where(stage == stages - 1, done, 0), "stage")

    return (
        run,
        (
            _abstract(mesh, (count, 32, D)),
            _abstract(mesh, (stages, D, F), "stage", None, "tensor"),
            _abstract(mesh, (stages, F, D), "stage", "tensor"),
        ),
        (),
    )


def collectives(mesh: Mesh) -> Made:
    """Every kind of collective, once."""

    @functools.partial(
        jax.shard_map,
        mesh=mesh,
        in_specs=P("data", "tensor"),
        out_specs=P("data", "tensor"),
        check_vma=False,
    )
    def run(x):
        scattered = lax.psum_scatter(x * 2, "tensor", tiled=True)
        whole = lax.all_gather(jnp.sin(scattered), "tensor", tiled=True)
        there = lax.all_to_all(whole + x, "tensor", 0, 1, tiled=True)
        back = lax.all_to_all(jnp.cos(there), "tensor", 1, 0, tiled=True)
        largest = lax.pmax(back, ("data", "tensor"))
        chain = lax.ppermute(jnp.tanh(largest), "data", [(0, 1)])
        return back * chain

    return run, (_abstract(mesh, (256, 1024), "data", "tensor", dtype=jnp.float32),), ()


def causal(mesh: Mesh) -> Made:
    """Blocks of queries that look back only: the inner loop grows with the outer."""
    tokens, block, width = 1024, 128, 256

    def run(q, k):
        def outer(i):
            rows = lax.dynamic_slice_in_dim(q, i * block, block, 0)

            def inner(j, total):
                columns = lax.dynamic_slice_in_dim(k, j * block, block, 0)
                return total + jnp.tanh(rows @ columns.T)

            return lax.fori_loop(0, i + 1, inner, jnp.zeros((block, block)))

        return lax.map(outer, jnp.arange(tokens // block))

    x = _abstract(mesh, (tokens, width), dtype=jnp.float32)
    return run, (x, x), ()


def gathered(mesh: Mesh) -> Made:
    """Weights sharded over data, gathered where they are used, and their gradients."""

    def loss(weights, x):
        for up, down in weights:
            x = x + jax.nn.relu(x @ up) @ down
        return jnp.sum(x.astype(jnp.float32) ** 2)

    def run(weights, x):
        slopes = jax.grad(loss)(weights, x)
        return jax.tree.map(lambda w, g: w - g.astype(w.dtype), weights, slopes)

    up, down = (_abstract(mesh, shape, "data") for shape in ((D, 2048), (2048, D)))
    return run, ([(up, down)] * 2, _abstract(mesh, (4096, D), "data")), (0,)


MESHES = {
    decode: {"data": 1, "stage": 2, "tensor": 4},
    scan: {"data": 1, "stage": 1, "tensor": 8},
    pipeline: {"data": 1, "stage": 4, "tensor": 2},
    collectives: {"data": 2, "stage": 1, "tensor": 4},
    causal: {"data": 1, "stage": 1, "tensor": 8},
    gathered: {"data": 8, "stage": 1, "tensor": 1},
}


def _without_config(line: re.Match[str]) -> str:
    """Cuts the compiler's notes, most of the text, from lines where none is read."""
    return re.sub(r", backend_config=\{.*\}$", "", line[0])


def main(target_name: str, program: str) -> None:
    """Compiles one program and writes its text, paths and most backend_config cut."""
    prepare_environment([target_name])
    target = parse_target(target_name)
    make = {f.__name__: f for f in MESHES}[program]
    sizes = MESHES[make]
    mesh = Mesh(
        target.mesh_devices(tuple(sizes.values())),
        tuple(sizes),
        axis_types=(AxisType.Auto,) * len(sizes),
    )
    function, arguments, donated = make(mesh)
    lowered = jax.jit(function, donate_argnums=donated).lower(*arguments)
    text = lowered.compile().as_text() or ""
    text = text.replace(str(HERE) + os.sep, "")
    version = ".".join(jax.__version__.split(".")[:2])
    text = re.sub(r' (scheduling|deduplicated)_name="[^"]*"', "", text)
    text = re.sub(r"(?m)^(?!.*(known_trip|custom-call)).*", _without_config, text)
    name = f"{program}.{target_name.partition(':')[0]}.jax{version}.hlo"
    comment = (
        f"// jax {jax.__version__}, {target_name}, mesh {sizes}:"
        f" python tests/data/hlo/make.py {target_name} {program}\n"
    )
    (HERE / name).write_text(comment + text.strip() + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
