from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import pytest
import scipy.stats

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
    bootstrap = Bootstrap(owners, tokens, replicates=50, seed=7)
    generator = np.random.default_rng(7)
    expected = []
    for _ in range(50):  # literally: draw documents, put their windows together, divide by their tokens
        documents = generator.integers(0, 12, 12)
        windows = [i for document in documents for i in range(len(owners)) if owners[i] == document]
        expected.append([sum(point[i] for i in windows) / sum(tokens[i] for i in windows) for point in losses])
    found = bootstrap.means(losses)
    assert np.allclose(found, expected, rtol=1e-12)
    monkeypatch.setattr("hf_moe_lmc.perplexity.bootstrap.BLOCK_ENTRIES", 40)  # in blocks of three
    assert np.array_equal(bootstrap.means(losses), found)
    barriers = curve.barrier((0.0, 0.5, 1.0), found)
    literal = [max(0.0, m - (a + b) / 2) for a, m, b in expected]
    assert bootstrap.interval(barriers) == pytest.approx(tuple(np.percentile(literal, [2.5, 97.5])))
    assert bootstrap.describe()["unit"] == "document" and bootstrap.caveat == "12 documents only: intervals may be too narrow"
    assert Bootstrap(tuple(range(20)), (4,) * 20).caveat is None


def test_intervals_hold_the_truth_as_often_as_they_promise() -> None:
    generator, held, runs = np.random.default_rng(0), 0, 200
    for _ in range(runs):
        owners, tokens, naive, aligned = simulated(generator, 40)
        bootstrap = Bootstrap(owners, tokens, replicates=400)
        barriers = [curve.barrier((0.0, 0.5, 1.0), bootstrap.means(losses)) for losses in (naive, aligned)]
        low, high = bootstrap.interval(barriers[0] - barriers[1]) or (0, 0)
        held += low <= 0.3 <= high
    assert 0.89 <= held / runs <= 0.985


T = (0.0, 0.5, 1.0)
STATISTICS: dict[
    str, Callable[[np.ndarray, np.ndarray], np.ndarray]
] = {  # losses [replicate, point] on two paths -> [replicate]
    "mean loss": lambda naive, aligned: naive[:, 1],
    "barrier": lambda naive, aligned: curve.barrier(T, naive),
    "area": lambda naive, aligned: curve.area(T, aligned),
    "difference of barriers": lambda naive, aligned: curve.barrier(T, naive) - curve.barrier(T, aligned),
}


def scipy_interval(
    statistic: Callable[[np.ndarray, np.ndarray], np.ndarray],
    bootstrap: Bootstrap,
    paths: Sequence[np.ndarray],
    *,
    by_token: bool = True,
    paired: bool = True,
) -> tuple[float, float]:
    """What scipy.stats.bootstrap finds for a statistic of two paths.

    Args:
        by_token: weight means by token; otherwise each document counts alike, which is another statistic.
        paired: all sums of a document stay together; otherwise losses and tokens of different documents are put together.
    """
    tokens = bootstrap.cluster_sums(np.array(bootstrap.tokens, dtype=float)[None])[0]
    sums = np.concatenate([bootstrap.cluster_sums(losses) for losses in paths])  # [path and point, document]

    def of_resamples(*samples: np.ndarray, axis: int) -> np.ndarray:
        losses, sizes = np.stack(samples[:-1]), samples[-1]  # [path and point, ..., document], [..., document]
        means = losses.sum(axis) / sizes.sum(axis) if by_token else (losses / sizes).mean(axis)
        per_path = means.reshape(2, 3, -1).transpose(0, 2, 1)  # [path, replicate, point]
        return statistic(*per_path).reshape(means.shape[1:])

    found = scipy.stats.bootstrap(
        (*sums, tokens), of_resamples, method="percentile", paired=paired, vectorized=True, axis=-1,
        n_resamples=bootstrap.replicates, confidence_level=bootstrap.level, rng=np.random.default_rng(5),
    )  # fmt: skip
    return tuple(found.confidence_interval)


@pytest.mark.parametrize("level", [0.95, 0.8])
@pytest.mark.parametrize("name", STATISTICS)
def test_intervals_are_those_of_scipy(name: str, level: float) -> None:
    owners, tokens, naive, aligned = simulated(np.random.default_rng(4), 30)
    # documents of unlike length, the long ones with higher losses: weights matter
    longer = np.array(owners) % 5 == 0
    sizes = np.array(tokens) * np.where(longer, 20, 1)
    naive, aligned = (losses / np.array(tokens) * sizes * np.where(longer, 1.5, 1) for losses in (naive, aligned))
    bootstrap = Bootstrap(owners, tuple(sizes.tolist()), replicates=20_000, level=level)
    statistic = STATISTICS[name]
    values = statistic(bootstrap.means(naive), bootstrap.means(aligned))
    ours = bootstrap.interval(values)
    assert ours is not None
    tails = np.array([(1 - level) / 2, (1 + level) / 2])
    # four standard errors of a quantile's rank, as an error of the quantile; both intervals have it
    rank_error = 4 * np.sqrt(tails * (1 - tails) / bootstrap.replicates)
    error = np.sqrt(2) * (np.quantile(values, tails + rank_error) - np.quantile(values, tails - rank_error)) / 2

    def agree(other: tuple[float, float]) -> bool:
        return bool((np.abs(np.array(ours) - np.array(other)) < error).all())

    assert agree(scipy_interval(statistic, bootstrap, (naive, aligned)))
    assert not agree(scipy_interval(statistic, bootstrap, (naive, aligned), by_token=False))  # the controls
    assert not agree(scipy_interval(statistic, bootstrap, (naive, aligned), paired=False))


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
    bootstrap = Bootstrap(owners, tokens, replicates=20)
    means = bootstrap.means(losses)
    assert np.isfinite(means[:, [0, 2]]).all() and np.isnan(means[:, 1]).all()
    barriers = curve.barrier((0.0, 0.5, 1.0), means)
    assert np.isnan(barriers).all() and all(map(math.isnan, bootstrap.interval(barriers) or ()))
