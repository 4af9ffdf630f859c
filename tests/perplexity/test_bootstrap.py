from __future__ import annotations

import math

import numpy as np
import pytest

from hf_moe_lmc.perplexity import curve
from hf_moe_lmc.perplexity.bootstrap import Bootstrap, half_width


def simulated(
    generator: np.random.Generator, documents: int, height: float = 0.5
) -> tuple[tuple[int, ...], tuple[int, ...], np.ndarray, np.ndarray]:
    """Documents of two windows on three points: what a document adds is common to all points, its barrier varies a little.

    Returns:
        document of each window, its tokens, losses of two paths [point, window]; the true barriers are `height` and 0.2.
    """
    owners = np.repeat(np.arange(documents), 2)
    tokens = generator.integers(20, 40, len(owners))
    level = 3 + generator.normal(0, 0.5, documents)[owners]
    rise = generator.normal(1, 0.2, documents)[owners]
    paths = [
        tokens * np.stack([level, level + top * rise + generator.normal(0, 0.02, len(owners)), level]) for top in (height, 0.2)
    ]
    return tuple(owners.tolist()), tuple(tokens.tolist()), paths[0], paths[1]


def test_the_bootstrap_is_what_it_says(monkeypatch: pytest.MonkeyPatch) -> None:
    owners, tokens, losses, _ = simulated(np.random.default_rng(3), 12)
    drawn = Bootstrap(owners, tokens, replicates=50, seed=7)
    generator = np.random.default_rng(7)
    expected = []
    for _ in range(50):  # literally: draw documents, put their windows together, divide by their tokens
        documents = generator.integers(0, 12, 12)
        windows = [i for document in documents for i in range(len(owners)) if owners[i] == document]
        expected.append([sum(point[i] for i in windows) / sum(tokens[i] for i in windows) for point in losses])
    found = drawn.means(losses)
    assert np.allclose(found, expected, rtol=1e-12)
    monkeypatch.setattr("hf_moe_lmc.perplexity.bootstrap.AT_ONCE", 40)  # in blocks of three
    assert np.array_equal(drawn.means(losses), found)
    barriers = curve.barrier((0.0, 0.5, 1.0), found)
    literal = [max(0.0, m - (a + b) / 2) for a, m, b in expected]
    assert drawn.interval(barriers) == pytest.approx(tuple(np.percentile(literal, [2.5, 97.5])))
    assert drawn.describe()["unit"] == "document" and drawn.caveat is None


def test_intervals_hold_the_truth_as_often_as_they_promise() -> None:
    generator, held, runs = np.random.default_rng(0), 0, 200
    for _ in range(runs):
        owners, tokens, naive, aligned = simulated(generator, 40)
        drawn = Bootstrap(owners, tokens, replicates=400)
        barriers = [curve.barrier((0.0, 0.5, 1.0), drawn.means(losses)) for losses in (naive, aligned)]
        low, high = drawn.interval(barriers[0] - barriers[1]) or (0, 0)
        held += low <= 0.3 <= high
    assert 0.89 <= held / runs <= 0.985


def test_pairing_makes_differences_surer_and_clusters_keep_them_honest() -> None:
    owners, tokens, naive, aligned = simulated(np.random.default_rng(1), 60, height=0.25)
    t = (0.0, 0.5, 1.0)

    def width(losses_a: np.ndarray, losses_b: np.ndarray, of: Bootstrap, other: Bootstrap) -> float:
        return half_width(of.interval(of.means(losses_a)[:, 1] - other.means(losses_b)[:, 1]))

    paired, again = Bootstrap(owners, tokens), Bootstrap(owners, tokens, seed=1)
    assert width(naive, aligned, paired, paired) < 0.2 * width(naive, aligned, paired, again)
    # windows of a document are alike: drawing them apart would claim too much
    apart = Bootstrap(tuple(range(len(owners))), tokens)
    barrier = [half_width(of.interval(curve.barrier(t, of.means(naive)))) for of in (apart, paired)]
    assert barrier[0] < 0.85 * barrier[1]


def test_one_document_falls_back_to_its_windows_and_says_so() -> None:
    losses = np.array([[2.0, 3.0, 4.0], [3.0, 4.0, 4.0]])
    one = Bootstrap((5, 5, 5), (1, 1, 1))
    assert (one.unit, one.count) == ("window", 3) and "as if they were independent" in (one.caveat or "")
    low, high = one.interval(one.means(losses)[:, 0]) or (0, 0)
    assert 2 <= low < 3 < high <= 4
    single = Bootstrap((0,), (4,))
    assert single.interval(single.means(losses[:, :1])[:, 0]) is None and "no intervals" in (single.caveat or "")
    assert "3 documents only" in (Bootstrap((0, 1, 1, 9), (1, 1, 1, 1)).caveat or "")
    assert half_width(None) == 0 and half_width((1.0, 2.0)) == 0.5


def test_a_loss_that_is_not_finite_spoils_its_own_point_only() -> None:
    owners, tokens, losses, _ = simulated(np.random.default_rng(2), 8)
    losses[1, 3] = np.inf
    drawn = Bootstrap(owners, tokens, replicates=20)
    means = drawn.means(losses)
    assert np.isfinite(means[:, [0, 2]]).all() and np.isnan(means[:, 1]).all()
    barriers = curve.barrier((0.0, 0.5, 1.0), means)
    assert np.isnan(barriers).all() and all(map(math.isnan, drawn.interval(barriers) or ()))
