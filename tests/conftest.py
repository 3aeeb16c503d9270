"""Tests see 9 CPU devices, and may compile for GPUs and TPUs that are not there."""

import jax

from sharding.target import prepare_environment

prepare_environment(["cpu:9", "v5p:2x2x2"])
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
