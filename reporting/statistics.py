"""Intervals, thresholds, routing and scaling from confidences P(C) and from what was right.

Throughout, `confidence` is (n,) in 0…1 and `correct` (n,) booleans or 0 and 1: whether the answer,
not the tag, is right. No function depends on the order of its input: equal confidences share their
mean outcome. Invalid input raises check_confidence()'s ValueError.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from scipy import optimize, sparse, stats
from scipy.special import expit, logit

from train_confidence_lora import (
    ECE_BINS,
    calibration_error,
    check_confidence,
    expected_calibration_error,
)

CHUNK = 200_000  # numbers of a simulation at a time: they fit a processor's cache
CLIP = 1e-7  # confidences come this close to 0 and 1 before their logit is taken
MIN_SCALING_SAMPLES = 10
TEST_POINTS = 16  # true calibration errors at which a test is inverted; in between it is linear
THRESHOLD_CANDIDATES = 100
# Where the tests for a threshold start, as a share of the way from the fewest answers that can show
# the target to all of them, and the part of the error each start may spend.
START_ERROR = {0.15: 0.8, 0.4: 0.2}


class Interval(NamedTuple):
    """A figure with the ends of its confidence interval; all None where it is undefined."""

    value: float | None
    low: float | None
    high: float | None


class Threshold(NamedTuple):
    """An application answers where confidence >= threshold. JSON keeps the number exactly."""

    threshold: float
    precision: Interval  # share correct of the answers at or above it
    coverage: Interval  # share of the answers at or above it; Clopper–Pearson, two-sided
    num_samples: int
    num_accepted: int


class Scaling(NamedTuple):
    """A recalibration: P(C) becomes sigmoid(a · logit(P(C)) + b)."""

    a: float
    b: float

    def apply(self, confidence: Any) -> np.ndarray:
        """(n,) probabilities -> (n,) probabilities; they are clipped to 1e-7…1 - 1e-7 first."""
        return expit(self.a * clipped_logit(confidence) + self.b)


def clipped_logit(confidence: Any) -> np.ndarray:
    return logit(np.clip(np.asarray(confidence, dtype=np.float64), CLIP, 1 - CLIP))


# ------------------------------------------------------------------------------------------------
# Metrics of many weighted samples at once. Everything is computed from tie groups: of each distinct
# confidence, the count of its answers and the count of those that are right


class Ties(NamedTuple):
    """The answers from the most confident to the least, as groups of equal confidence."""

    confidence: np.ndarray  # (groups,) descending
    order: np.ndarray  # (n,) indices of the answers
    starts: np.ndarray  # (groups,) of each group in `order`
    correct: np.ndarray  # (n,) in the order of the input

    def counts(self, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Weights (draws, n) of the answers -> (draws, groups) totals, and totals of the right."""
        weights = weights[:, self.order]
        total = np.add.reduceat(weights, self.starts, axis=1)
        right = np.add.reduceat(weights * self.correct[self.order], self.starts, axis=1)
        return total, right


def tie_groups(confidence: Any, correct: Any) -> Ties:
    confidence, correct = check_confidence(confidence, correct)
    order = np.argsort(-confidence, kind="stable")
    ranked = confidence[order]
    starts = np.flatnonzero(np.diff(ranked, prepend=2.0))
    return Ties(ranked[starts], order, starts, correct)


def weighted_auroc(confidence: np.ndarray, count: np.ndarray, right: np.ndarray) -> np.ndarray:
    """(draws,) from (groups,) descending confidences and their counts; NaN for a single class."""
    wrong = count - right
    above = np.cumsum(right, axis=1) - right / 2  # a tie counts half
    with np.errstate(invalid="ignore"):
        return (wrong * above).sum(axis=1) / (wrong.sum(axis=1) * right.sum(axis=1))


def weighted_brier(confidence: np.ndarray, count: np.ndarray, right: np.ndarray) -> np.ndarray:
    loss = right @ (1 - confidence) ** 2 + (count - right) @ confidence**2
    return loss / count.sum(axis=1)


def weighted_nll(confidence: np.ndarray, count: np.ndarray, right: np.ndarray) -> np.ndarray:
    smallest = np.finfo(np.float64).eps  # as in scikit-learn's log_loss
    confidence = np.clip(confidence, smallest, 1 - smallest)
    loss = right @ -np.log(confidence) + (count - right) @ -np.log1p(-confidence)
    return loss / count.sum(axis=1)


def weighted_mean(confidence: np.ndarray, count: np.ndarray, right: np.ndarray) -> np.ndarray:
    return count @ confidence / count.sum(axis=1)


def weighted_aurc(confidence: np.ndarray, count: np.ndarray, right: np.ndarray) -> np.ndarray:
    wrong = count - right
    accepted, errors = (np.cumsum(counts, axis=1) - counts for counts in (count, wrong))
    # Group by group the sum over j = 1…count of (errors + j · share) / (accepted + j)
    share = wrong / np.maximum(count, 1)
    total = int(count[0].sum())
    harmonic = np.append(0.0, np.cumsum(1 / np.arange(1, total + 1)))
    accepted, after = accepted.astype(int), (accepted + count).astype(int)
    slope = harmonic[after] - harmonic[accepted]
    return (wrong + (errors - accepted * share) * slope).sum(axis=1) / total


def weighted_accuracy_at(count: np.ndarray, right: np.ndarray, coverage: float) -> np.ndarray:
    wanted = coverage * count.sum(axis=1)
    accepted, corrects = (np.cumsum(counts, axis=1) for counts in (count, right))
    last = np.minimum((accepted < wanted[:, None]).sum(axis=1), count.shape[1] - 1)
    row = np.arange(len(count))
    missing = (accepted[row, last] - wanted) / count[row, last]  # share of the last group left out
    return (corrects[row, last] - missing * right[row, last]) / wanted


COVERAGES = {f"accuracy_at_{percent}": percent / 100 for percent in (50, 80, 90)}
METRICS = {
    "auroc": weighted_auroc,
    "brier": weighted_brier,
    "nll": weighted_nll,
    "mean_confidence": weighted_mean,
    "aurc": weighted_aurc,
}
PAIRED_METRICS = ("auroc", "brier", "nll", "aurc")


def every_metric(ties: Ties, weights: np.ndarray) -> dict[str, np.ndarray]:
    count, right = ties.counts(weights)
    values = {name: metric(ties.confidence, count, right) for name, metric in METRICS.items()}
    for name, coverage in COVERAGES.items():
        values[name] = weighted_accuracy_at(count, right, coverage)
    return values


# ------------------------------------------------------------------------------------------------
# Intervals


def clopper_pearson(
    successes: int, count: int, level: float = 0.95, side: str = "two"
) -> tuple[float, float]:
    """The exact binomial interval of a share (Clopper & Pearson 1934).

    Args:
        successes: out of `count`.
        count: independent trials, at least 1.
        level: the least probability that the interval holds the true share.
        side: "two"; "lower" for a lower bound alone (high is 1), "upper" for an upper (low is 0).
    """
    if side not in ("two", "lower", "upper"):
        raise ValueError(f"side is {side!r}, it must be two, lower or upper")
    if not 0 <= successes <= count or count < 1:
        raise ValueError(f"{successes} successes of {count}")
    tail = (1 - level) / (2 if side == "two" else 1)
    low, high = 0.0, 1.0
    if side != "upper" and successes > 0:
        low = float(stats.beta.ppf(tail, successes, count - successes + 1))
    if side != "lower" and successes < count:
        high = float(stats.beta.isf(tail, successes + 1, count - successes))
    return low, high


def share_interval(successes: int, count: int, level: float) -> Interval:
    return Interval(float(successes / count), *clopper_pearson(int(successes), count, level))


def resampling_weights(n: int, draws: int, seed: int) -> Iterator[np.ndarray]:
    """Chunks (at most draws, n) of how often each answer is in a bootstrap sample of n."""
    rng = np.random.default_rng(seed)
    size = max(1, CHUNK // n)
    for first in range(0, draws, size):
        rows = min(size, draws - first)
        picks = rng.integers(n, size=(rows, n)) + np.arange(rows)[:, None] * n
        yield np.bincount(picks.ravel(), minlength=rows * n).reshape(rows, n).astype(np.float64)


def percentile_interval(value: float, draws: np.ndarray, level: float) -> Interval:
    """NaN draws, resamples of a single class, are left out."""
    draws = draws[np.isfinite(draws)]
    if not np.isfinite(value) or not len(draws):
        return Interval(None, None, None)
    low, high = np.quantile(draws, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(value), float(low), float(high))


def bootstrap_intervals(
    confidence: Any,
    correct: Any,
    emitted_right: Any = None,
    draws: int = 2000,
    level: float = 0.95,
    seed: int = 0,
) -> dict[str, Interval]:
    """Each metric with its interval, from resampling the answers (Efron's percentile bootstrap).

    answer_accuracy and accuracy are plain shares and have Clopper–Pearson intervals: the bootstrap
    of a share near 0 or 1 is too short, and at 0 or 1 a single point; Wilson's keeps the level only
    on average over shares, Clopper–Pearson's at each. accuracy_at_50, _80 and _90, the accuracy of
    the most confident 50, 80 and 90 %, take the wider of bootstrap (which knows that another sample
    would put other answers above the line) and Clopper–Pearson (which holds near 1). An AUROC of 0
    or 1 has the Clopper–Pearson interval of as many trials as the smaller class has answers: so
    many pairs of a right and a wrong answer are independent of each other.

    Args:
        confidence: (n,) probabilities in 0…1.
        correct: (n,) booleans or 0 and 1.
        emitted_right: (n,) booleans, whether the tag written is the right one; adds `accuracy`.
        draws: bootstrap samples.
        level: of every interval on its own.
        seed: of the resampling.

    Returns:
        auroc, brier, nll (nats), mean_confidence, answer_accuracy, accuracy, aurc (see aurc()) and
        accuracy_at_50, _80, _90 as Intervals. auroc is None when all answers are right or all
        wrong, and its interval is over the resamples that hold both; everything is None for n = 0.
    """
    ties = tie_groups(confidence, correct)
    n = len(ties.order)
    shares = {"answer_accuracy": ties.correct}
    if emitted_right is not None:
        shares["accuracy"] = check_confidence(confidence, emitted_right)[1]
    if not n:
        return dict.fromkeys([*METRICS, *COVERAGES, *shares], Interval(None, None, None))
    values = every_metric(ties, np.ones((1, n)))
    chunks = [every_metric(ties, weights) for weights in resampling_weights(n, draws, seed)]
    intervals = {
        name: percentile_interval(value[0], np.concatenate([c[name] for c in chunks]), level)
        for name, value in values.items()
    }
    for name, coverage in COVERAGES.items():
        accepted = max(1, round(coverage * n))
        exact = clopper_pearson(round(values[name][0] * accepted), accepted, level)
        value, low, high = intervals[name]
        intervals[name] = Interval(value, min(low, exact[0]), max(high, exact[1]))
    pairs = int(min(ties.correct.sum(), n - ties.correct.sum()))
    if intervals["auroc"].value in (0, 1):
        intervals["auroc"] = share_interval(int(intervals["auroc"].value) * pairs, pairs, level)
    for name, right in shares.items():
        intervals[name] = share_interval(right.sum(), n, level)
    return intervals


def paired_difference(
    metric: str,
    confidence: Any,
    other: Any,
    correct: Any,
    draws: int = 2000,
    level: float = 0.95,
    seed: int = 0,
) -> Interval:
    """metric(confidence) - metric(other) on the same answers, by the bootstrap over answers.

    Both are computed on the same resamples, so what makes an answer hard for both cancels out.

    Args:
        metric: auroc, brier, nll or aurc.
        confidence: (n,) probabilities in 0…1.
        other: (n,) probabilities of the same answers, say before training.
        correct: (n,) booleans or 0 and 1.
        draws: bootstrap samples.
        level: of the interval; 0 outside it is a difference at this level.
        seed: of the resampling.
    """
    if metric not in PAIRED_METRICS:
        raise ValueError(f"metric is {metric!r}, it must be one of {', '.join(PAIRED_METRICS)}")
    pair = [tie_groups(values, correct) for values in (confidence, other)]
    n = len(pair[0].order)
    if not n:
        return Interval(None, None, None)

    def difference(weights: np.ndarray) -> np.ndarray:
        first, second = (METRICS[metric](t.confidence, *t.counts(weights)) for t in pair)
        return first - second

    drawn = np.concatenate([difference(w) for w in resampling_weights(n, draws, seed)])
    return percentile_interval(difference(np.ones((1, n)))[0], drawn, level)


# A calibration error is a norm of the gaps of its bins, and a bin's gap is linear in the outcomes.


def bin_averages(
    confidence: np.ndarray, kind: str, beta: int
) -> tuple[sparse.csr_matrix, np.ndarray]:
    """The bins of calibration_error() or expected_calibration_error() as a linear map.

    Args:
        confidence: (n,) ascending.

    Returns:
        averages: (bins, n) of the filled bins; averages @ outcomes (n,) are their shares correct.
        share: (bins,) of the answers.
    """
    n = len(confidence)
    if kind == "ece":
        bins = np.minimum((confidence * ECE_BINS).astype(int), ECE_BINS - 1)
    else:
        bins = np.minimum(np.arange(n) // beta, max(1, n // beta) - 1)
    _, bins, counts = np.unique(bins, return_inverse=True, return_counts=True)
    _, group, sizes = np.unique(confidence, return_inverse=True, return_counts=True)
    held = sparse.csr_matrix((1 / counts[bins], (bins, group)))
    mean = sparse.csr_matrix((1 / sizes[group], (group, np.arange(n))))
    return held @ mean, counts / n


def gap_norm(gaps: np.ndarray, share: np.ndarray, p: str) -> np.ndarray:
    """Gaps (bins, draws), shares (bins,) -> errors (draws,)."""
    gaps = np.abs(gaps)
    if p == "infty":
        return gaps.max(axis=0)
    return (share @ gaps ** int(p)) ** (1 / int(p))


def miscalibrations(
    confidence: np.ndarray, correct: np.ndarray, gaps: np.ndarray, errors: np.ndarray, bins: Any
) -> list[np.ndarray]:
    """Two shapes (n,) that the true miscalibration may have: spread over all confidences as Platt's
    map has it, or only in the bins whose gap is beyond two standard errors (or the one nearest).

    Args:
        gaps: (bins,) share correct - mean confidence.
        errors: (bins,) their standard errors.
        bins: (n, bins) each answer's part in each bin.
    """
    spread = smoothed_fit(confidence, correct, "platt").apply(confidence) - confidence
    size = np.abs(gaps) / errors
    local = np.where(size >= min(2, size.max()), gaps, 0.0)
    return [spread, bins @ (local if local.any() else errors)]


def scaled_miscalibrations(
    confidence: np.ndarray,
    direction: np.ndarray,
    averages: sparse.csr_matrix,
    share: np.ndarray,
    p: str,
    largest: float,
) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities clip(confidence + s · direction) for scales s >= 0, as (points, n), whose true
    errors (points,) lie evenly between 0 and `largest`."""

    def maps(scales: np.ndarray) -> np.ndarray:
        return np.clip(confidence + scales[:, None] * direction, 0, 1)

    def true_errors(scales: np.ndarray) -> np.ndarray:
        return gap_norm(averages @ (maps(scales) - confidence).T, share, p)

    unit = max(float(gap_norm(averages @ direction[:, None], share, p)[0]), 1e-9)
    scales = np.append(0, np.geomspace(1e-2, 1e3, 60) * largest / unit)
    errors = true_errors(scales)
    rising = np.append(True, errors[1:] > np.maximum.accumulate(errors)[:-1])
    wanted = np.linspace(0, min(largest, errors.max()), TEST_POINTS)
    scales = np.interp(wanted, errors[rising], scales[rising])
    return maps(scales), true_errors(scales)


def simulated_quantiles(
    maps: np.ndarray,
    confidence: np.ndarray,
    averages: sparse.csr_matrix,
    share: np.ndarray,
    p: str,
    levels: list[float],
    draws: int,
    seed: int,
) -> np.ndarray:
    """Quantiles (levels, points) of the measured error when maps (points, n) are the truth."""
    rng = np.random.default_rng(seed)
    n = len(confidence)
    mean = (averages @ confidence)[:, None]
    size = max(1, CHUNK // n)
    measured = []
    for first in range(0, draws, size):
        uniform = rng.random((n, min(size, draws - first)), dtype=np.float32)
        outcomes = (uniform < truth.astype(np.float32)[:, None] for truth in maps)
        measured.append([gap_norm(mean - averages @ right, share, p) for right in outcomes])
    return np.quantile(np.concatenate(measured, axis=1), levels, axis=1)


def inverted(quantiles: np.ndarray, true: np.ndarray, value: float) -> tuple[float, float]:
    """The ends of the true errors (points,), ascending from 0, whose quantiles when simulated
    (3, points: lower, median, upper) have the measured value between the outer ones."""
    slack = 1e-12  # of rounding, where many simulated errors equal the measured one
    lower, median, upper = np.maximum.accumulate(quantiles, axis=1)
    typical = max(value, median[0])
    first = np.searchsorted(upper, value - slack)  # the first point that is inside
    last = np.searchsorted(lower, typical + slack, side="right") - 1

    def end(curve: np.ndarray, value: float, inside: int, outside: int) -> float:
        """Where the curve meets the value between two neighbours; a plateau may reach to either."""
        inside, outside = np.clip((inside, outside), 0, len(true) - 1)
        if abs(curve[inside] - value) <= slack:
            return float(true[outside])
        pair = sorted((inside, outside))
        return float(np.interp(value, curve[pair], true[pair]))

    return end(upper, value, first, first - 1), end(lower, typical, last, last + 1)


def calibration_interval(
    confidence: Any,
    correct: Any,
    p: str | int = "2",
    beta: int = 100,
    kind: str = "calibration_error",
    level: float = 0.95,
    draws: int = 1000,
    seed: int = 0,
) -> Interval:
    """The measured calibration error, and an interval for the true one of these confidences.

    The true error is that of P(right | confidence) in the same bins, without the noise of the
    outcomes. A bootstrap would miss it: noise makes gaps where there are none, so the measured
    error is biased upward, a resample's twice, and 0 could never be inside. Instead a test is
    inverted: miscalibrations of a given shape are scaled from none upward, outcomes drawn from each
    with the confidences fixed, and the interval holds the true errors of all those under which the
    measured one lies between the (1 ∓ level) / 2 quantiles. As the noise depends on the shape, this
    is done for two, one spread over all confidences (Platt's map fitted to the data) and one local
    (the bins that stand out), and the interval spans both results. Its upper end is at least the
    one that the median perfectly calibrated model would have, so that luck does not make it 0.

    Simulated (n = 500 and 1,000; p = 1, 2, infty and ece; perfect and five kinds of
    miscalibration), it held the truth in 93 to 99 % of sets at level 0.95; the bootstrap's, p = 2,
    in none of those that were perfectly calibrated.

    Args:
        confidence: (n,) probabilities in 0…1.
        correct: (n,) booleans or 0 and 1.
        p, beta: of calibration_error(); unused for "ece".
        kind: "calibration_error" or "ece", expected_calibration_error().
        level: of the interval.
        draws: simulated sets of outcomes for each miscalibration.
        seed: of the simulation.

    Returns:
        Interval in 0…1; low is 0 where the data agree with perfect calibration. The value may lie
        above high, being biased. All None for n = 0.
    """
    if kind not in ("calibration_error", "ece"):
        raise ValueError(f"kind is {kind!r}, it must be calibration_error or ece")
    if kind == "ece":
        p, value = "1", expected_calibration_error(confidence, correct)
    else:
        p, value = str(p), calibration_error(confidence, correct, p, beta)
    if value is None:
        return Interval(None, None, None)
    confidence, correct = check_confidence(confidence, correct)
    order = np.lexsort((correct, confidence))
    confidence, correct = confidence[order], correct[order]
    averages, share = bin_averages(confidence, kind, beta)
    mean, right = averages @ confidence, averages @ correct
    count = share * len(confidence)
    error = np.sqrt(np.maximum(mean * (1 - mean), right * (1 - right)) / count + count**-2.0)
    largest = value + float(gap_norm(4 * error[:, None], share, p)[0])
    bins = averages.T.multiply(count).tocsr()
    ends = []
    for shape in miscalibrations(confidence, correct, right - mean, error, bins):
        maps, true = scaled_miscalibrations(confidence, shape, averages, share, p, largest)
        levels = [(1 - level) / 2, 0.5, (1 + level) / 2]
        quantiles = simulated_quantiles(maps, confidence, averages, share, p, levels, draws, seed)
        ends.append(inverted(quantiles, true, value))
    low, high = np.array(ends).T
    return Interval(value, float(low.min()), float(high.max()))


# ------------------------------------------------------------------------------------------------
# Selective answering


def risk_coverage(confidence: Any, correct: Any) -> tuple[np.ndarray, np.ndarray]:
    """Coverage and risk of answering at or above each distinct confidence, the highest first.

    Returns:
        coverage: (distinct,) share answered, ascending up to 1.
        risk: (distinct,) share wrong of what is answered.
    """
    ties = tie_groups(confidence, correct)
    count, right = ties.counts(np.ones((1, len(ties.order))))
    accepted = np.cumsum(count[0])
    return accepted / len(ties.order), np.cumsum(count[0] - right[0]) / accepted


def aurc(confidence: Any, correct: Any) -> float | None:
    """Area under the risk–coverage curve: the mean over k = 1…n of the share wrong among the k most
    confident answers (Geifman, Uziel & El-Yaniv 2019, https://arxiv.org/abs/1805.08206). Equal
    confidences enter with their mean outcome. None for n = 0."""
    ties = tie_groups(confidence, correct)
    if not len(ties.order):
        return None
    return float(weighted_aurc(ties.confidence, *ties.counts(np.ones((1, len(ties.order)))))[0])


def accuracy_at_coverage(confidence: Any, correct: Any, coverage: float) -> float | None:
    """Share correct of the most confident `coverage` (above 0, up to 1) of the answers.

    Where the line falls within an answer, or among answers of equal confidence, these count in part
    and by their mean outcome. None for n = 0.
    """
    check_coverage(coverage)
    ties = tie_groups(confidence, correct)
    if not len(ties.order):
        return None
    return float(weighted_accuracy_at(*ties.counts(np.ones((1, len(ties.order)))), coverage)[0])


def check_coverage(coverage: float) -> None:
    if not 0 < coverage <= 1:
        raise ValueError(f"coverage is {coverage}, it must be above 0 and at most 1")


def choose_threshold(
    confidence: Any, correct: Any, target: float, level: float = 0.95
) -> Threshold | None:
    """The lowest threshold at which the precision is shown to be at least `target`.

    Whatever the data, with probability `level` either no threshold is returned or the share correct
    at or above it, among new answers of the same population, is at least `target`. The lowest
    threshold whose own Clopper–Pearson bound meets the target breaks this promise: it looks often,
    and picks where chance was kind (in 18 to 38 % of simulated sets, n = 300 to 3,000, whose
    precision was just below the target at every threshold; the choice here in under 5 %).

    The candidates, about 100 ranks chosen without looking at the outcomes, are tested from the most
    confident downward by exact binomial tests under the fallback procedure (Wiens & Dmitrienko
    2005), a fixed sequence that shares the error among several starting points: a passed test hands
    its share on to the next, a failed one loses it (Learn then Test, Angelopoulos et al. 2021,
    https://arxiv.org/abs/2110.01052).

    Args:
        confidence: (n,) probabilities in 0…1.
        correct: (n,) booleans or 0 and 1.
        target: wanted precision, above 0 and below 1.
        level: of the promise.

    Returns:
        None when the target is not shown to be reachable: too few answers, or too few right. Else
        a Threshold; precision.low is the one-sided bound that passed (at least the target, which
        alone is promised), precision.high is 1.
    """
    if not 0 < target < 1:
        raise ValueError(f"target is {target}, it must be above 0 and below 1")
    ties = tie_groups(confidence, correct)
    n = len(ties.order)
    fewest = int(np.ceil(np.log((1 - level) * max(START_ERROR.values())) / np.log(target)))
    if n < fewest:  # not even all of them right would show it
        return None
    accepted, right = (np.cumsum(c[0]).astype(int) for c in ties.counts(np.ones((1, n))))
    ranks = np.rint(np.linspace(fewest, n, THRESHOLD_CANDIDATES))
    groups = np.unique(np.searchsorted(accepted, ranks))
    budget = np.zeros(len(groups))
    for start, part in START_ERROR.items():
        first = np.searchsorted(accepted, fewest + start * (n - fewest))
        budget[min(np.searchsorted(groups, first), len(groups) - 1)] += part * (1 - level)
    error, chosen = 0.0, None
    chances = stats.binom.sf(right[groups] - 1, accepted[groups], target)  # of as many right
    for group, extra, chance in zip(groups, budget, chances):
        error += extra
        if error and chance <= error:
            chosen = group, error
        else:
            error = 0.0
    if chosen is None:
        return None
    group, error = chosen
    successes, count = int(right[group]), int(accepted[group])
    precision = Interval(
        successes / count, *clopper_pearson(successes, count, 1 - error, side="lower")
    )
    coverage = share_interval(count, n, level)
    return Threshold(float(ties.confidence[group]), precision, coverage, n, count)


def threshold_for_coverage(
    confidence: Any, correct: Any, coverage: float, level: float = 0.95
) -> Threshold:
    """The highest threshold that answers at least `coverage` (above 0, up to 1) of the answers.

    It is chosen by the confidences alone, so the Clopper–Pearson interval of its precision
    (two-sided, at `level`) holds. ValueError for n = 0.
    """
    check_coverage(coverage)
    ties = tie_groups(confidence, correct)
    n = len(ties.order)
    if not n:
        raise ValueError("a threshold needs at least one answer")
    accepted, right = (np.cumsum(c[0]).astype(int) for c in ties.counts(np.ones((1, n))))
    last = int(np.searchsorted(accepted, coverage * n - 1e-9))
    return Threshold(
        float(ties.confidence[last]),
        share_interval(right[last], int(accepted[last]), level),
        share_interval(accepted[last], n, level),
        n,
        int(accepted[last]),
    )


def routing_curves(
    confidence: Any,
    correct: Any,
    bigger_correct: Any,
    cost: float,
    bigger_cost: float,
    points: int = 101,
) -> dict[str, np.ndarray]:
    """What asking a bigger model about the least confident questions costs and gains.

    The local model answers every question; those below a threshold go on to the bigger model.
    Between two thresholds the curves are straight: of equal confidences a random part is routed.

    Args:
        confidence: (n,) probabilities in 0…1, of the local model's answers.
        correct: (n,) whether the local model's answers are right.
        bigger_correct: (n,) whether the bigger model's are.
        cost: of a local answer, in any unit.
        bigger_cost: of a bigger model's answer, on top, in the same unit.
        points: shares of questions routed, from 0 to 1.

    Returns:
        (points,) arrays: share_routed; cost, the mean per question; and the share of questions
        answered correctly when the routed ones are chosen by confidence (accuracy), at random
        (random), or by an oracle that knows what is right (perfect: first where only the bigger
        model is right, last where only the local one is).
    """
    if points < 2:
        raise ValueError(f"points is {points}, it must be at least 2")
    confidence, correct = check_confidence(confidence, correct)
    bigger_correct = check_confidence(confidence, bigger_correct)[1]
    n = len(confidence)
    if not n:
        raise ValueError("routing needs at least one answer")
    gain = bigger_correct - correct
    share = np.linspace(0, 1, points)

    def accuracy(key: np.ndarray) -> np.ndarray:
        """When the questions of the smallest key are routed first."""
        _, group = np.unique(key, return_inverse=True)
        routed, gained = (np.append(0, np.cumsum(np.bincount(group, w))) for w in (None, gain))
        return (correct.sum() + np.interp(share * n, routed, gained)) / n

    return {
        "share_routed": share,
        "cost": cost + share * bigger_cost,
        "accuracy": accuracy(confidence),
        "random": accuracy(np.zeros(n)),
        "perfect": accuracy(-gain),
    }


# ------------------------------------------------------------------------------------------------
# Recalibration


def smoothed_fit(confidence: np.ndarray, correct: np.ndarray, method: str) -> Scaling:
    """fit_scaling() of checked input; Platt's targets make it finite for any."""
    scores = clipped_logit(confidence)
    positives = correct.sum()
    negatives = len(correct) - positives
    target = np.where(correct == 1, (positives + 1) / (positives + 2), 1 / (negatives + 2))

    def loss(parameters: np.ndarray) -> tuple[float, np.ndarray]:
        z = parameters[0] * scores + parameters[1]
        slope = expit(z) - target
        value = (np.logaddexp(0, z) - target * z).mean()
        return value, np.array([(slope * scores).mean(), slope.mean()])

    if method == "platt":
        a, b = optimize.minimize(loss, [1.0, 0.0], jac=True, method="BFGS").x
        return Scaling(float(a), float(b))
    best = optimize.minimize_scalar(
        lambda log_a: loss(np.array([np.exp(log_a), 0.0]))[0],
        bounds=(-7, 7),
        method="bounded",
        options={"xatol": 1e-9},
    )
    return Scaling(float(np.exp(best.x)), 0.0)


def fit_scaling(confidence: Any, correct: Any, method: str = "platt") -> Scaling:
    """The recalibration with the least NLL.

    Both methods fit Platt's smoothed targets, (right + 1) / (right + 2) and 1 / (wrong + 2) in
    place of 1 and 0 (Platt 1999), which keep separable data finite.

    Args:
        confidence: (n,) probabilities in 0…1.
        correct: (n,) booleans or 0 and 1.
        method: "platt" fits a and b; "temperature" a > 0 alone (Guo et al. 2017: a = 1 / T).

    Raises:
        ValueError: fewer than 10 answers, or all of them right, or all wrong.
    """
    if method not in ("platt", "temperature"):
        raise ValueError(f"method is {method!r}, it must be platt or temperature")
    confidence, correct = check_confidence(confidence, correct)
    if len(correct) < MIN_SCALING_SAMPLES:
        raise ValueError(
            f"scaling needs at least {MIN_SCALING_SAMPLES} answers, there are {len(correct)}"
        )
    if correct.min() == correct.max():
        raise ValueError(
            f"scaling needs right and wrong answers, all are {'right' if correct[0] else 'wrong'}"
        )
    return smoothed_fit(confidence, correct, method)
