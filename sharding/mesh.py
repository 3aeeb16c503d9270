"""The mesh: devices arranged along the axes data, stage and tensor."""

import numpy as np
from jax.sharding import AxisType, Mesh

from sharding.rules import MESH_AXES


def make_mesh(devices: np.ndarray) -> Mesh:
    """Returns the mesh of `devices`, an array of shape (data, stage, tensor).

    All axes are `Auto`: the compiler completes layouts from the constraints that a
    rule table gives; axes become `Manual` only inside `jax.shard_map`.
    """
    return Mesh(devices, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))
