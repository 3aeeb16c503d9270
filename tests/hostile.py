"""A small sound checkpoint to damage, and what every refusal is held to."""

import contextlib
import pathlib
import time
import tracemalloc
from collections.abc import Iterator

import numpy as np
import pytest

import jaxllm
from jaxllm import weights
from jaxllm.config import ModelConfig
from jaxllm.model import Part
from tests import checkpoints

CONFIG = ModelConfig(
    num_layers=1,
    embed_dim=32,
    num_heads=4,
    num_kv_heads=2,
    head_dim=6,
    mlp_dim=64,
    vocab_size=40,
    rope_theta=1e4,
    rope_scaling=None,
    norm_eps=1e-5,
    tie_embeddings=False,
)
TENSORS = checkpoints.hugging_face(checkpoints.random_params(CONFIG), CONFIG)
FIELDS = checkpoints.config_json(CONFIG)
# Headers of JSON have up to 4 MB, and parsing one takes a few times as much.
ALLOWED_BYTES, ALLOWED_S = 16 << 20, 5.0


@contextlib.contextmanager
def refuses(message: str) -> Iterator[None]:
    """Holds what is done inside to raise our ValueError, soon and in little memory."""
    tracemalloc.start()
    begin = time.process_time()
    try:
        with pytest.raises(ValueError, match=message) as caught:
            yield
        peak_bytes = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak_bytes < ALLOWED_BYTES
    assert time.process_time() - begin < ALLOWED_S
    assert is_ours(caught.value)


def is_ours(error: BaseException) -> bool:
    """Whether `error` was raised by a line of ours, and says what to do."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    assert trace is not None
    home = str(pathlib.Path(jaxllm.__file__).parent)
    text = str(error)
    return (
        trace.tb_frame.f_code.co_filename.startswith(home)
        and type(error) is ValueError
        and text.endswith(".")
        and "\n" not in text
        and len(text) < 1500
    )


def read_all(checkpoint: weights.Checkpoint) -> dict[str, np.ndarray]:
    """Returns every array of a checkpoint of the sizes of `CONFIG`."""
    paths: list[tuple[Part, tuple[str, ...]]]
    paths = [(0, ("attention_norm", "scale")), (0, ("mlp_norm", "scale"))]
    paths += [(0, ("attention", "w_qkv")), (0, ("attention", "w_out"))]
    paths += [(0, ("mlp", "w_gate_up")), (0, ("mlp", "w_down"))]
    paths += [("ends", ("embedding",)), ("ends", ("final_norm", "scale"))]
    if not checkpoint.config.tie_embeddings:
        paths.append(("ends", ("w_head",)))
    return {
        f"{part}.{'.'.join(path)}": checkpoint.read(
            part, path, (slice(None),) * (1 + (path[-1] != "scale")), np.float32
        )
        for part, path in paths
    }
