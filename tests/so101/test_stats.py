"""Statistics of success rates: published examples, definitions by brute force, and coverage on simulated runs."""

import itertools
from math import comb

import numpy as np
import pytest
from scipy.stats import binomtest, ttest_ind

from so101 import stats


@pytest.mark.parametrize(
    "successes, count, published",
    [(81, 263, (0.2553, 0.3662)), (15, 148, (0.0624, 0.1605)), (0, 20, (0.0, 0.1611)), (1, 29, (0.0061, 0.1718))],
)
def test_wilson_intervals_as_published(successes, count, published):
    """The examples of Newcombe (1998), Statistics in Medicine 17, 857, without continuity correction."""
    low, high = stats.wilson(successes / count, count)
    np.testing.assert_allclose([low, high], published, atol=5e-5)
    for bound in (low, high):  # the definition: a rate from which the observed one is 1.96 standard errors away
        assert abs(successes / count - bound) == pytest.approx(stats.Z * np.sqrt(bound * (1 - bound) / count), abs=1e-9)
    library = binomtest(successes, count).proportion_ci(0.95, method="wilson")
    np.testing.assert_allclose([low, high], [library.low, library.high], atol=1e-9)


@pytest.mark.parametrize(
    "k, n, published", [((48, 56), (80, 70), (0.0524, 0.3339)), ((3, 9), (10, 10), (0.1705, 0.8090))]
)
def test_difference_of_independent_rates_as_published(k, n, published):
    """Method 10, examples (a) and (b) of Newcombe (1998), Statistics in Medicine 17, 873."""
    first, second = (successes / count for successes, count in zip(k, n))
    interval = stats.difference_interval(first, stats.wilson(first, n[0]), second, stats.wilson(second, n[1]))
    np.testing.assert_allclose(interval, published, atol=5e-5)


@pytest.mark.parametrize(
    "table, published", [(((36, 12), (2, 0)), (0.0569, 0.3404)), (((14, 5), (0, 22)), (0.011, 0.226))]
)
def test_difference_of_paired_rates_as_published(table, published):
    """Method 10 of Newcombe (1998), Statistics in Medicine 17, 2635; Altman et al. (2000), table 6.2.

    The tables give the success of the first minus that of the second, so the interval here has the opposite sign.
    """
    counts = np.array(table)
    first, second = counts[0].sum() / counts.sum(), counts[:, 0].sum() / counts.sum()
    of_first, of_second = (stats.wilson(rate, counts.sum()) for rate in (first, second))
    low, high = stats.difference_interval(first, of_first, second, of_second, stats.paired_correlation(counts))
    np.testing.assert_allclose([-high, -low], published, atol=5e-4)


@pytest.mark.parametrize("one, other", [(0, 0), (5, 0), (1, 7), (4, 4), (3, 6)])
def test_mcnemar_by_enumeration(one, other):
    """All sequences of fair coins: how many are at least as uneven as the observed one."""
    uneven = [abs(2 * sum(coins) - one - other) for coins in itertools.product((0, 1), repeat=one + other)]
    assert stats.mcnemar(one, other) == pytest.approx(np.mean([each >= abs(one - other) for each in uneven]))


@pytest.mark.parametrize("k, n", [((3, 9), (10, 10)), ((5, 5), (8, 12)), ((0, 4), (6, 5))])
def test_fisher_by_enumeration(k, n):
    """All tables with the same sums: the probability of those that are no more likely than the observed one."""
    total = sum(k)
    likely = [comb(n[0], i) * comb(n[1], total - i) for i in range(total + 1)]
    expected = sum(each for each in likely if each <= likely[k[0]]) / sum(likely)
    assert stats.fisher(k, n) == pytest.approx(expected)


def test_welch_is_that_of_the_means():
    rng = np.random.default_rng(0)
    first, second = rng.uniform(0.3, 0.9, 6), rng.uniform(0.5, 1.0, 9)
    variances = tuple(stats.rate_variance(rates, 10**6) for rates in (first, second))
    p_value, bounds = stats.welch(second.mean() - first.mean(), variances, (6, 9))
    library = ttest_ind(second, first, equal_var=False)
    interval = library.confidence_interval(0.95)
    assert p_value == pytest.approx(library.pvalue) and bounds == pytest.approx([interval.low, interval.high])
    p_value, bounds = stats.welch(0.1, (0.05**2, 0.0), (1, 1))  # two standard errors of a normal distribution
    assert p_value == pytest.approx(0.0455, abs=1e-4) and bounds == pytest.approx([0.1 - 0.098, 0.1 + 0.098], abs=1e-4)
    assert stats.welch(0.9, (0.3**2, 0.0), (2, 1))[1] == [-1.0, 1.0]


def test_holm():
    """Each of n values against its own bound: the k-th smallest is significant at level a if n - k + 1 times it is."""
    values = [0.01, 0.04, 0.03, 0.005]
    np.testing.assert_allclose(stats.holm(values), [3 * 0.01, 2 * 0.03, 2 * 0.03, 4 * 0.005])
    assert stats.holm([0.9, 0.8]) == [1.0, 1.0] and stats.holm([]) == []


def test_probability_of_improvement_by_enumeration():
    first, second = np.array([0.5, 0.7, 0.7]), np.array([0.6, 0.7, 0.9, 0.4])
    wins = [(b > a) + (a == b) / 2 for a in first for b in second]
    assert stats.probability_of_improvement(first, second) == pytest.approx(np.mean(wins))
    assert stats.improvement_interval(first, first + 0.3) == [1.0, 1.0]
    low, high = stats.improvement_interval(first, second)
    assert 0 <= low < np.mean(wins) < high <= 1


def test_interquartile_mean_and_its_interval():
    """Against the definition: the middle half after sorting, and seeds resampled one by one."""
    values = np.random.default_rng(1).normal(0, 1, (8, 3))
    middle = np.sort(values, axis=0)[2:6].mean(0)
    np.testing.assert_allclose(stats.interquartile_mean(values, axis=0), middle)
    rng = np.random.default_rng(2)
    resampled = [values[rng.integers(0, 8, 8)] for _ in range(4000)]
    middles = [np.sort(each, axis=0)[2:6].mean(0) for each in resampled]
    expected = np.percentile(middles, [2.5, 97.5], axis=0)
    # two bootstraps, 2,000 and 4,000: 0.03 apart
    np.testing.assert_allclose(stats.bootstrap_interval(values), expected, atol=0.1)


def simulate(rng, runs, episodes, level, spread, difficulty):
    """Outcomes (runs, episodes) of runs of different quality on the same episodes of different difficulty."""
    logit = level + spread * rng.standard_normal((runs, 1)) + difficulty * rng.standard_normal((1, episodes))
    return (rng.random((runs, episodes)) < 1 / (1 + np.exp(-logit))).astype(float)


def test_variance_of_runs_on_common_episodes():
    """Its mean is the variance of the success rate when runs and episodes are drawn again."""
    rng = np.random.default_rng(3)
    drawn = [simulate(rng, 6, 40, 1.0, 0.6, 1.5) for _ in range(3000)]
    estimated = np.mean([stats.rate_variance(each.mean(1), 40, each) for each in drawn])
    actual = np.var([each.mean() for each in drawn])
    of_runs_only = np.mean([stats.rate_variance(each.mean(1), 40) for each in drawn])
    assert estimated == pytest.approx(actual, rel=0.1)  # 3,000 draws: a standard error of 2.6 %
    assert of_runs_only < 0.75 * actual  # what the list of episodes is for


@pytest.mark.parametrize("level, spread, difficulty", [(5.0, 0.9, 1.6), (2.6, 0.7, 1.3)])  # success 97 and 87 %
def test_coverage_of_the_interval_over_five_runs(level, spread, difficulty):
    """The interval contains the true rate as often as it says; a percentile bootstrap over five runs does not."""
    rng = np.random.default_rng(4)
    truth = np.mean([simulate(rng, 1500, 1500, level, spread, difficulty).mean() for _ in range(6)])
    inside = np.zeros(2)
    for _ in range(400):
        outcomes = simulate(rng, 5, 200, level, spread, difficulty)
        rates = outcomes.mean(1)
        bootstrap = np.percentile(rates[rng.integers(0, 5, (400, 5))].mean(1), [2.5, 97.5])
        for i, (low, high) in enumerate((stats.rate_interval(rates, 200, outcomes), bootstrap)):
            inside[i] += low <= truth <= high
    ours, bootstrap = inside / 400
    assert 0.93 < ours < 0.99 and bootstrap < 0.85


def test_intervals_at_the_ends():
    """Nothing but successes: never wider than 0 to 1, never of no width, and wider for fewer runs."""
    widths = []
    for runs in (2, 3, 5, 10):
        low, high = stats.rate_interval(np.ones(runs), 200, np.ones((runs, 200)))
        assert high == 1.0 and 0 < low < 1
        widths.append(high - low)
    assert widths == sorted(widths, reverse=True)
    low, high = stats.rate_interval(np.array([1.0, 1.0, 1.0, 1.0, 0.95]), 200)
    assert 0.9 < low < 0.99 < high < 1
    assert stats.rate_interval(np.array([0.3]), 50) == stats.wilson(0.3, 50)
    variances = stats.rate_variance(np.ones(3), 100), stats.rate_variance(np.ones(1), 100)
    assert 0 < variances[0] < variances[1] and stats.welch(0.0, variances, (3, 1))[0] == 1.0
