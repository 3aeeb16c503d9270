"""The reference is itself right where a hand can tell."""

import dataclasses

import numpy as np
import pytest

from tests import reference


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scaling:
    """The values of Llama 3.1 (config.json of meta-llama/Llama-3.1-8B)."""

    factor: float = 8.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Every size is different from every other, so a transposed axis cannot hide."""

    num_layers: int = 3
    embed_dim: int = 20
    num_heads: int = 6
    num_kv_heads: int = 2
    head_dim: int = 8
    mlp_dim: int = 28
    vocab_size: int = 37
    rope_theta: float = 500_000.0
    rope_scaling: Scaling | None = Scaling()
    norm_eps: float = 1e-5


CONFIG = Config()
TOKENS = np.random.default_rng(1).integers(CONFIG.vocab_size, size=(2, 11))


@pytest.fixture(params=[True, False], ids=["tied", "untied"])
def params(request: pytest.FixtureRequest) -> dict[str, np.ndarray]:
    return reference.random_params(CONFIG, tied=request.param, seed=0)


def test_earlier_logits_do_not_see_a_later_token(params: dict[str, np.ndarray]) -> None:
    changed = TOKENS.copy()
    changed[:, 7] = (changed[:, 7] + 1) % CONFIG.vocab_size
    before = reference.logits(params, CONFIG, TOKENS)
    after = reference.logits(params, CONFIG, changed)
    np.testing.assert_array_equal(before[:, :7], after[:, :7])
    assert np.abs(before[:, 7:] - after[:, 7:]).max(axis=(0, 2)).min() > 1e-3


def test_sequences_do_not_see_each_other(params: dict[str, np.ndarray]) -> None:
    together = reference.logits(params, CONFIG, TOKENS)
    alone = reference.logits(params, CONFIG, TOKENS[1:])
    np.testing.assert_allclose(together[1:], alone, rtol=1e-12)


def test_rotary_keeps_lengths_and_depends_on_distance_only() -> None:
    rng = np.random.default_rng(2)
    q, k = rng.standard_normal((2, 1, 5, 8))
    frequency = reference.rotary_frequencies(8, 10_000.0, None)

    def score(q_position: int, k_position: int) -> np.ndarray:
        turned_q = reference.apply_rotary(q, np.array([q_position]), frequency)
        turned_k = reference.apply_rotary(k, np.array([k_position]), frequency)
        np.testing.assert_allclose(
            np.linalg.norm(turned_q, axis=-1), np.linalg.norm(q, axis=-1)
        )
        return np.sum(turned_q * turned_k, axis=-1)

    np.testing.assert_allclose(score(9, 4), score(105, 100))
    assert np.abs(score(9, 4) - score(9, 5)).max() > 1e-3


def test_rotary_turns_first_half_towards_second() -> None:
    """Position 1 of a head of two: an ordinary rotation by one radian."""
    x = np.array([[[1.0, 0.0]]])
    turned = reference.apply_rotary(x, np.array([1]), np.array([1.0]))
    np.testing.assert_allclose(turned, [[[np.cos(1), np.sin(1)]]])


def test_scaling_leaves_fast_pairs_and_slows_slow_pairs() -> None:
    plain = reference.rotary_frequencies(128, 500_000.0, None)
    scaled = reference.rotary_frequencies(128, 500_000.0, Scaling())
    turns = 8192 * plain / (2 * np.pi)
    np.testing.assert_array_equal(scaled[turns >= 4], plain[turns >= 4])
    np.testing.assert_allclose(scaled[turns <= 1], plain[turns <= 1] / 8)
    between = (turns > 1) & (turns < 4)
    assert between.sum() > 1
    assert np.all(
        (scaled[between] < plain[between]) & (scaled[between] > plain[between] / 8)
    )
    assert np.all(np.diff(scaled) < 0)


def test_equal_scores_average_the_values() -> None:
    """With no queries every earlier position counts the same."""
    params = reference.random_params(CONFIG, tied=True, seed=3)
    layer = {
        name.removeprefix("layers.0."): value
        for name, value in params.items()
        if name.startswith("layers.0.")
    }
    layer["w_q"] = np.zeros_like(layer["w_q"])
    x = np.random.default_rng(4).standard_normal((1, 5, CONFIG.embed_dim))
    v = np.einsum("btd,dkh->btkh", x, layer["w_v"])
    mean = np.cumsum(v, axis=1) / np.arange(1, 6)[None, :, None, None]
    heads = mean[
        :, :, [0, 0, 0, 1, 1, 1]
    ]  # six query heads over two of keys and values
    expected = np.einsum("btnh,nhd->btd", heads, layer["w_o"])
    np.testing.assert_allclose(reference._attention(x, layer, CONFIG), expected)


def test_no_layers_is_norm_and_head() -> None:
    config = dataclasses.replace(CONFIG, num_layers=0, norm_eps=0.0)
    params = reference.random_params(config, tied=False, seed=5)
    x = params["embedding"][TOKENS]
    rms = np.linalg.norm(x, axis=-1, keepdims=True) / np.sqrt(config.embed_dim)
    expected = (x / rms * params["final_norm"]) @ params["head"]
    np.testing.assert_allclose(reference.logits(params, config, TOKENS), expected)


def test_wrong_parameters_are_named() -> None:
    params = reference.random_params(CONFIG, tied=True, seed=0)
    params["layers.1.w_q"] = params["layers.1.w_q"].transpose(1, 0, 2)
    with pytest.raises(
        ValueError, match=r"layers\.1\.w_q: \(6, 20, 8\), not \(20, 6, 8\)"
    ):
        reference.logits(params, CONFIG, TOKENS)
