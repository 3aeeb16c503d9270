"""Arrays of the published model against those that a partition computes with.

`Partition.computed` repeats key/value heads over tensor devices and fills the hidden
width and the vocabulary up with zeros where they do not divide. `widen` does that to
the parameters of one part of the model, a decoder block or the ends; `narrow` undoes
it to the bit. Both are traceable and leave what needs no change as it is.
"""

import jax
import jax.numpy as jnp

from jaxllm.config import ModelConfig
from jaxllm.layers import mlp_pieces
from jaxllm.model import Tree


def widen(tree: Tree, config: ModelConfig, model: ModelConfig) -> Tree:
    """Returns one part of the published model as it is computed.

    Args:
      tree: parameters of a block, or some of the ends.
      config: the model as published.
      model: the model as computed.
    """
    if "attention" not in tree:
        return _resize_ends(tree, config.vocab_size, model.vocab_size)
    return {
        **tree,
        "attention": {
            **tree["attention"],
            "w_qkv": _repeat_kv(tree["attention"]["w_qkv"], config, model),
        },
        "mlp": _resize_mlp(tree["mlp"], config, model),
    }


def narrow(tree: Tree, config: ModelConfig, model: ModelConfig) -> Tree:
    """Returns one part of the computed model as it is published."""
    if "attention" not in tree:
        return _resize_ends(tree, model.vocab_size, config.vocab_size)
    return {
        **tree,
        "attention": {
            **tree["attention"],
            "w_qkv": _first_kv(tree["attention"]["w_qkv"], config, model),
        },
        "mlp": _resize_mlp(tree["mlp"], model, config),
    }


def _repeat_kv(w_qkv: jax.Array, config: ModelConfig, model: ModelConfig) -> jax.Array:
    """Repeats every key/value head, and deals its queries out over the copies."""
    if config.num_kv_heads == model.num_kv_heads:
        return w_qkv
    d, k, h = config.embed_dim, config.num_kv_heads, config.head_dim
    w_qkv = w_qkv.reshape(d, k, config.group_size + 2, h)
    queries = w_qkv[:, :, :-2].reshape(d, model.num_kv_heads, model.group_size, h)
    shared = jnp.repeat(w_qkv[:, :, -2:], model.num_kv_heads // k, axis=1)
    return jnp.concatenate([queries, shared], axis=2).reshape(d, -1)


def _first_kv(w_qkv: jax.Array, config: ModelConfig, model: ModelConfig) -> jax.Array:
    if config.num_kv_heads == model.num_kv_heads:
        return w_qkv
    d, k, h = config.embed_dim, config.num_kv_heads, config.head_dim
    w_qkv = w_qkv.reshape(d, model.num_kv_heads, model.group_size + 2, h)
    queries = w_qkv[:, :, :-2].reshape(d, k, config.group_size, h)
    shared = w_qkv[:, :: model.num_kv_heads // k, -2:]
    return jnp.concatenate([queries, shared], axis=2).reshape(d, -1)


def _resize_mlp(tree: Tree, old: ModelConfig, new: ModelConfig) -> Tree:
    if old.mlp_dim == new.mlp_dim:
        return tree
    d = old.embed_dim
    pieces = tree["w_gate_up"].reshape(d, mlp_pieces(old), 2, -1)
    gate_up = jnp.swapaxes(pieces, 1, 2).reshape(d, 2, old.mlp_dim)
    gate_up = _resize(gate_up, 2, new.mlp_dim).reshape(d, 2, mlp_pieces(new), -1)
    return {
        "w_gate_up": jnp.swapaxes(gate_up, 1, 2).reshape(d, -1),
        "w_down": _resize(tree["w_down"], 0, new.mlp_dim),
    }


def _resize_ends(tree: Tree, old: int, new: int) -> Tree:
    if old == new:
        return tree
    axes = {"embedding": 0, "w_head": 1}
    return {
        name: _resize(leaf, axes[name], new) if name in axes else leaf
        for name, leaf in tree.items()
    }


def _resize(x: jax.Array, axis: int, size: int) -> jax.Array:
    """Cuts `x` off along `axis`, or fills it up with zeros."""
    extra = size - x.shape[axis]
    if extra <= 0:
        return jax.lax.slice_in_dim(x, 0, size, axis=axis)
    return jnp.pad(x, [(0, extra if i == axis else 0) for i in range(x.ndim)])
