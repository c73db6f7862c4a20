"""Statistics of success rates: intervals over episodes and training runs, comparisons of two policies.

A *run* is one trained model with its evaluation. All intervals are for 95 %, all p values are two-sided.
"""

from __future__ import annotations

import numpy as np

MANY = 10  # runs from which a percentile bootstrap over runs is not too narrow
Z = 1.959963984540054  # the normal distribution's 97.5 % quantile


def wilson(rate: float, count: float, quantile: float = Z) -> list[float]:
    """Wilson's score interval of a success rate (Wilson 1927).

    Args:
        rate: share of successes.
        count: number of independent episodes, also an effective one.
        quantile: quantile of the normal distribution, or of Student's where the variance is estimated.
    """
    square = quantile**2
    centre = (rate + square / (2 * count)) / (1 + square / count)
    half = quantile * np.sqrt(rate * (1 - rate) / count + square / (4 * count**2)) / (1 + square / count)
    low, high = centre - half, centre + half
    return [0.0 if rate == 0 else float(max(low, 0.0)), 1.0 if rate == 1 else float(min(high, 1.0))]


def interquartile_mean(values: np.ndarray, axis: int = -1) -> np.ndarray:
    """Mean of the middle half: less sensitive to single seeds than the mean, and uses more data than the median."""
    from scipy.stats import trim_mean

    return trim_mean(values, 0.25, axis=axis)


def bootstrap_interval(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Percentile bootstrap 95 % interval of the interquartile mean over seeds, axis 0.

    With one task there is one stratum, so resampling seeds is the stratified bootstrap of Agarwal et al. (2021). With
    fewer than ten seeds it is too narrow, see `rate_interval`.
    """
    from scipy.stats import bootstrap

    if len(values) < 2:
        return values[0], values[0]
    generator = np.random.default_rng(0)
    result = bootstrap(
        (values,), interquartile_mean, axis=0, n_resamples=2000, method="percentile", vectorized=True, rng=generator
    )
    return result.confidence_interval.low, result.confidence_interval.high


def rate_variance(rates: np.ndarray, episodes: int, outcomes: np.ndarray | None = None) -> float:
    """Variance of the mean success rate of runs that were evaluated on the same episodes.

    Runs and episodes are crossed random effects. The variance is that of the runs' means, plus that of the episodes'
    means, minus what both contain: the random part of each outcome (Owen 2007 has this sum). It is at least the
    variance of as many independent episodes.

    Args:
        rates: success rate of each run, (n,).
        episodes: number of episodes per run, m.
        outcomes: success of each run in each episode, (n, m); None if not known. The variance then contains the choice
            of the runs only, not that of the episodes.
    """
    n, total = len(rates), len(rates) * episodes
    rate = (rates.mean() * total + 0.5) / (total + 1)  # not 1.0, however many episodes succeeded
    least = rate * (1 - rate) / total
    if n == 1:
        return float(least)
    variance = rates.var(ddof=1) / n
    if outcomes is not None and episodes > 1:
        of_episodes = outcomes.mean(0)
        rest = outcomes - rates[:, None] - of_episodes + rates.mean()
        share = of_episodes.var(ddof=1) / episodes - (rest**2).sum() / ((n - 1) * (episodes - 1)) / total
        variance += max(share, 0.0)
    return float(max(variance, least))


def rate_interval(rates: np.ndarray, episodes: int, outcomes: np.ndarray | None = None) -> list[float]:
    """95 % interval of the success rate over training runs and episodes; arguments as in `rate_variance`.

    For one run it is Wilson's. For several it is Wilson's with two changes: the number of episodes is the effective
    one, of as many independent episodes as would have the variance of these runs, and the quantile is Student's with
    n - 1 degrees of freedom, since this variance is estimated from n runs. Franco et al. (2019) compare such intervals.
    It is not symmetric and stays within 0 and 1. docs/evaluation.md has its coverage.
    """
    from scipy.stats import t

    rate, n = float(rates.mean()), len(rates)
    if n == 1:
        return wilson(rate, episodes)
    variance, total = rate_variance(rates, episodes, outcomes), n * episodes
    size = rate * (1 - rate) / variance if 0 < rate < 1 else total
    return wilson(rate, min(size, total), float(t.ppf(0.975, n - 1)))


def paired_correlation(table: np.ndarray) -> float:
    """Newcombe's (1998) estimate of the correlation of two policies' successes on the same episodes.

    Args:
        table: counts (2, 2), rows: the first policy succeeds, fails; columns: the second.
    """
    (a, b), (c, d) = table
    product = float(a + b) * float(c + d) * float(a + c) * float(b + d)
    if not product:
        return 0.0
    excess = float(a * d - b * c)
    return (max(excess - table.sum() / 2, 0.0) if excess > 0 else excess) / np.sqrt(product)


def difference_interval(
    first: float, of_first: list[float], second: float, of_second: list[float], correlation: float = 0.0
) -> list[float]:
    """95 % interval of the difference second - first, from the two rates, their intervals and their correlation.

    With Wilson's intervals it is method 10 of Newcombe (1998), for independent samples (Statistics in Medicine 17, 873)
    with correlation 0, for paired ones (17, 2635) with `paired_correlation`.
    """
    difference = second - first
    down, up = second - of_second[0], of_first[1] - first
    low = difference - np.sqrt(max(down**2 + up**2 - 2 * correlation * down * up, 0.0))
    up, down = of_second[1] - second, first - of_first[0]
    high = difference + np.sqrt(max(down**2 + up**2 - 2 * correlation * down * up, 0.0))
    return [float(low), float(high)]


def mcnemar(only_first: int, only_second: int) -> float:
    """Exact p value of McNemar's test: the episodes in which just one policy succeeds are those of a fair coin."""
    from scipy.stats import binomtest

    count = only_first + only_second
    return float(binomtest(only_first, count).pvalue) if count else 1.0


def fisher(successes: tuple[int, int], counts: tuple[int, int]) -> float:
    """p value of Fisher's exact test for two policies on different episodes."""
    from scipy.stats import fisher_exact

    return float(fisher_exact([[k, n - k] for k, n in zip(successes, counts)]).pvalue)


def welch(difference: float, variances: tuple[float, float], runs: tuple[int, int]) -> tuple[float, list[float]]:
    """p value of Welch's t test for two mean success rates, and the 95 % interval of their difference.

    Args:
        difference: difference of the two means.
        variances: variances of the two means, see `rate_variance`. That of a policy with one run is known from the
            number of its episodes, and has no degrees of freedom.
        runs: number of runs of each policy.
    """
    from scipy.stats import t

    total = sum(variances)
    parts = sum(variance**2 / (n - 1) for variance, n in zip(variances, runs) if n > 1)
    student = t(total**2 / parts if parts else np.inf)
    half = student.ppf(0.975) * np.sqrt(total)
    bounds = np.clip([difference - half, difference + half], -1, 1)
    return float(2 * student.sf(abs(difference) / np.sqrt(total))), [float(bound) for bound in bounds]


def paired_difference(first: np.ndarray, second: np.ndarray) -> tuple[float, list[float], float]:
    """Mean difference second - first of the success rates (n,) of the same n > 1 seeds, its 95 % interval and p value.

    Both are of Student's paired t test. The differences must not all be equal, because then the spread is unknown.
    """
    from scipy.stats import ttest_rel

    test = ttest_rel(second, first)
    return (
        float((second - first).mean()),
        [float(bound) for bound in test.confidence_interval(0.95)],
        float(test.pvalue),
    )


def holm(values: list[float]) -> list[float]:
    """p values corrected for their number (Holm 1979): the k-th smallest of n is multiplied by n - k + 1."""
    corrected, highest = [0.0] * len(values), 0.0
    for rank, i in enumerate(np.argsort(values, kind="stable")):
        highest = max(highest, min(values[i] * (len(values) - rank), 1.0))
        corrected[i] = highest
    return corrected


def probability_of_improvement(first: np.ndarray, second: np.ndarray) -> float:
    """Share of all pairs of runs (n,), (m,) in which the second's is better; ties count half (Agarwal et al. 2021)."""
    return float((np.sign(second[:, None] - first).mean() + 1) / 2)


def improvement_interval(first: np.ndarray, second: np.ndarray) -> list[float]:
    """Percentile bootstrap 95 % interval of `probability_of_improvement`, runs of both policies resampled."""
    rng = np.random.default_rng(0)
    drawn = [
        probability_of_improvement(rng.choice(first, len(first)), rng.choice(second, len(second))) for _ in range(2000)
    ]
    return [float(bound) for bound in np.percentile(drawn, [2.5, 97.5])]
