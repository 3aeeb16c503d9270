"""Trained models by name or path, and the devices to run one on."""

import dataclasses
import os
import pathlib
from collections.abc import Callable

import jax
from absl import logging
from jax.sharding import Mesh

from jaxllm import config as config_lib
from jaxllm import weights
from jaxllm.config import ModelConfig
from jaxllm.model import Params
from jaxllm.tokenizer import Tokenizer, tokenizer_of
from sharding.layout import Layout
from sharding.load import load_params
from sharding.target import GPUS, TPUS, Target, parse_target, prepare_environment

DEFAULT = "smollm2-135m"

# Told how many parts of the model are there, and of how many.
Progress = Callable[[int, int], None]

# Where drivers show accelerators. JAX finds them too, but looks for seconds, and aloud.
_DEVICE_FILES = ("nvidia[0-9]*", "accel[0-9]*", "vfio/[0-9]*", "kfd")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Trained:
    """A trained model; its parameters are read when they are asked for.

    Attributes:
      name: as it was asked for.
      config: its shape.
      tokenizer: its text.
      load: returns its parameters as a layout says, on the devices of a mesh.
    """

    name: str
    config: ModelConfig
    tokenizer: Tokenizer
    load: Callable[[Layout, Mesh, Progress | None], Params]


def find(model: str | None = None, checkpoint: str | None = None) -> Trained:
    """Returns a trained model, having read headers only.

    Args:
      model: a preset, or the path of a config.json; None is what the checkpoint says,
        or else `DEFAULT`.
      checkpoint: a Hugging Face folder, a GGUF file or a folder that
        `sharding.checkpoint` wrote; None is the weights of the preset.

    Raises:
      ValueError: there is none, it is not whole, or it is another model.
      ModuleNotFoundError: a package for its files is not installed.
    """
    if checkpoint is None:
        return _preset(model or DEFAULT)
    path = pathlib.Path(checkpoint).expanduser()
    found = _saved(path) if _is_saved(path) else _files(checkpoint, path)
    if model is not None and (asked := config_lib.load(model)) != found.config:
        there = dataclasses.asdict(found.config)
        differ = {k: v for k, v in dataclasses.asdict(asked).items() if there[k] != v}
        raise ValueError(
            f"model {model!r} has {_words(differ)}; checkpoint {checkpoint!r} has"
            f" {_words({k: there[k] for k in differ})}. They must be the same model."
            " Leave --model out, and the checkpoint says it."
        )
    return found


def _words(fields: dict[str, object]) -> str:
    return ", ".join(f"{name}={value}" for name, value in fields.items())


def _preset(name: str) -> Trained:
    config = config_lib.load(name)
    if name not in weights.PRESET_WEIGHTS:
        raise ValueError(
            f"model {name!r} has no weights here; those of"
            f" {', '.join(weights.PRESET_WEIGHTS)} come in a package. Nothing is"
            " downloaded. Give a Hugging Face folder, a .gguf file or a converted"
            " checkpoint with --checkpoint=PATH."
        )
    found = _files(name, weights.PRESET_WEIGHTS[name]())
    return dataclasses.replace(found, config=config)


def _files(name: str, path: pathlib.Path) -> Trained:
    checkpoint = weights.open_checkpoint(path)
    return Trained(
        name=name,
        config=checkpoint.config,
        tokenizer=tokenizer_of(path),
        load=lambda layout, mesh, progress: load_params(
            checkpoint, layout, mesh, progress
        ),
    )


def _is_saved(path: pathlib.Path) -> bool:
    """Whether `path` is for `sharding.checkpoint` to read, or to refuse."""
    # Not by pathlib: a name may be too long, or a folder not ours to read.
    return os.path.isdir(path) and not os.path.exists(path / "config.json")


def _saved(path: pathlib.Path) -> Trained:
    # Only here: Orbax takes seconds to import.
    from sharding import checkpoint

    logging.set_verbosity(logging.WARNING)  # it tells every array otherwise
    saved = checkpoint.open_saved(path)
    if "tokenizer" not in saved.extra:
        raise ValueError(
            f"checkpoint {path} has no tokenizer; it was saved with"
            f" {', '.join(saved.extra) or 'nothing'} beside its arrays. Text needs one."
            " Convert the original files again with `python -m experiments.convert`."
        )
    return Trained(
        name=str(path),
        config=saved.config,
        tokenizer=Tokenizer.from_json(saved.extra["tokenizer"]),
        load=lambda layout, mesh, progress: checkpoint.restore_params(
            path, layout, mesh, progress
        ),
    )


def find_target(name: str, num_devices: int) -> Target:
    """Returns devices that run programs, as many as asked for. Starts JAX.

    Args:
      name: "attached", "cpu:8", or "auto": the attached accelerators if there are
        enough, else virtual CPU devices.
      num_devices: of the partition.

    Raises:
      ValueError: there are not so many, or they are only compiled for.
    """
    if name.partition(":")[0] in (*GPUS, *TPUS):
        raise ValueError(
            f"target {name!r} is compiled for and never run. Text needs devices that"
            " are there. Use --target=attached, --target=cpu:N, or leave it out."
        )
    if name == "auto":
        name = _automatic(num_devices)
    else:
        prepare_environment([name])
    # Nothing is priced, so any chip will do, also for devices without a file of rates.
    target = parse_target(name, "cpu")
    if target.num_devices < num_devices:
        raise ValueError(
            f"the partition needs {num_devices} devices; target {name!r} has"
            f" {target.num_devices}. Every device of a partition is another. Use a"
            f" smaller partition, or virtual devices: --target=cpu:{num_devices}."
        )
    return dataclasses.replace(target, devices=target.devices[:num_devices])


def _automatic(num_devices: int) -> str:
    cpus = f"cpu:{num_devices}"
    if os.environ.get("JAX_PLATFORMS") == "cpu" or not _have_accelerators():
        prepare_environment([cpus])
        return cpus
    prepare_environment(["attached", cpus])
    devices = jax.devices()
    enough = devices[0].platform != "cpu" and len(devices) >= num_devices
    return "attached" if enough else cpus


def _have_accelerators() -> bool:
    return any(any(pathlib.Path("/dev").glob(files)) for files in _DEVICE_FILES)
