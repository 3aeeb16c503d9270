"""Tokens are drawn from what temperature, top-k and top-p keep, as often as due."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.decode import Sampling, pick

VOCAB, DRAWS = 40, 20_000


def kept_chances(logits: np.ndarray, sampling: Sampling) -> np.ndarray:
    """Returns the chance of every token, in float64, from the definitions."""
    scores = logits.astype(np.float64) / sampling.temperature
    order = np.argsort(-scores)
    if sampling.top_k:
        order = order[: sampling.top_k]
    chance = np.exp(scores[order] - scores.max())
    chance /= chance.sum()
    fewest = int(np.searchsorted(np.cumsum(chance), sampling.top_p)) + 1
    order, chance = order[:fewest], chance[:fewest]
    result = np.zeros(len(logits))
    result[order] = chance / chance.sum()
    return result


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(temperature=1.0),
        Sampling(temperature=0.5),
        Sampling(temperature=2.0, top_k=7),
        Sampling(temperature=1.0, top_p=0.6),
        Sampling(temperature=1.5, top_k=10, top_p=0.8),
        Sampling(temperature=1.0, top_k=1),
        Sampling(temperature=1.0, top_k=1000, top_p=1e-9),
    ],
    ids=str,
)
def test_tokens_come_as_often_as_their_chance(sampling: Sampling) -> None:
    logits = np.random.default_rng(0).normal(0, 2, VOCAB).astype(np.float32)
    expected = kept_chances(logits, sampling)
    tokens = pick(
        jnp.broadcast_to(jnp.asarray(logits), (DRAWS, VOCAB)),
        sampling,
        jnp.arange(DRAWS, dtype=jnp.uint32),
        jnp.int32(3),
    )
    found = np.bincount(np.asarray(tokens), minlength=VOCAB) / DRAWS
    assert not found[expected == 0].any()
    # Five standard deviations of a count of DRAWS.
    np.testing.assert_allclose(found, expected, atol=5 * np.sqrt(0.25 / DRAWS), rtol=0)


def test_a_draw_depends_on_seed_and_position_alone() -> None:
    sampling = Sampling(temperature=3.0)
    logits = jnp.asarray(np.random.default_rng(1).normal(size=(6, VOCAB)), jnp.float32)
    seeds = jnp.arange(6, dtype=jnp.uint32)
    positions = jnp.arange(10, 16, dtype=jnp.int32)
    together = pick(logits, sampling, seeds, positions)
    alone = [
        pick(logits[i : i + 1], sampling, seeds[i : i + 1], positions[i])[0]
        for i in range(6)
    ]
    np.testing.assert_array_equal(together, alone)
    same = pick(
        jnp.tile(logits[:1], (64, 1)),
        sampling,
        jnp.full(64, 7, jnp.uint32),
        jnp.arange(64, dtype=jnp.int32),
    )
    assert len(set(np.asarray(same).tolist())) > 8  # another position, another draw


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("temperature", -0.1, r"temperature=-0.1 .* 0 \(greedy\) or more"),
        ("temperature", float("nan"), "temperature=nan"),
        ("temperature", float("inf"), "temperature=inf"),
        ("top_k", -1, r"top_k=-1 .* 0 \(all tokens\) or more"),
        ("top_p", 0.0, "top_p=0.0 .* above 0 and at most 1"),
        ("top_p", 1.1, "top_p=1.1"),
    ],
)
def test_values_out_of_range_are_refused(
    field: str, value: float, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(Sampling(), **{field: value})
