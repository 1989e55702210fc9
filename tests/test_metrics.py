import numpy as np
import pytest
import torch
from sklearn.metrics import brier_score_loss, log_loss, roc_auc_score
from torchmetrics.classification import BinaryCalibrationError

from train_confidence_lora import (
    Score,
    calibration_error,
    calibration_error_if_perfect,
    confidence_metrics,
    expected_calibration_error,
)


def sample(n, seed=0):
    rng = np.random.default_rng(seed)
    confidence = rng.random(n)
    return confidence, rng.random(n) < confidence**2


def by_hand(confidence, correct, p, beta):
    """The definition, bin by bin in plain Python."""
    pairs = sorted(zip(confidence, correct))
    bins = [pairs[i * beta : (i + 1) * beta] for i in range(max(1, len(pairs) // beta))]
    bins[-1] = pairs[(len(bins) - 1) * beta :]
    gaps = [abs(sum(c for c, _ in b) - sum(o for _, o in b)) / len(b) for b in bins]
    if p == "infty":
        return max(gaps)
    total = sum(gap ** int(p) * len(b) / len(pairs) for gap, b in zip(gaps, bins))
    return total ** (1 / int(p))


@pytest.mark.parametrize("p", ["1", "2", "infty"])
@pytest.mark.parametrize(("n", "beta"), [(1000, 100), (1037, 100), (57, 100), (200, 1), (100, 100)])
def test_calibration_error_equals_an_independent_computation(p, n, beta):
    confidence, correct = sample(n)
    expected = by_hand(confidence, correct, p, beta)
    assert calibration_error(confidence, correct, p, beta) == pytest.approx(expected, abs=1e-12)


def test_the_last_bin_counts():
    confidence = np.r_[np.full(100, 0.2), np.full(100, 0.9)]
    correct = np.r_[np.arange(100) < 20, np.zeros(100)]  # the first bin is perfect, the last is not
    assert calibration_error(confidence, correct, "infty") == pytest.approx(0.9)
    assert calibration_error(confidence, correct, "1") == pytest.approx(0.45)


@pytest.mark.parametrize(("norm", "p"), [("l1", "1"), ("l2", "2"), ("max", "infty")])
def test_equal_width_bins_agree_with_torchmetrics(norm, p):
    confidence, correct = sample(2000)
    confidence[:3], correct[:3] = (0.0, 1.0, 1.0), (0, 1, 1)
    metric = BinaryCalibrationError(n_bins=15, norm=norm)
    # the library's rows are the probabilities of class 1, its error the gap of their means
    expected = metric(torch.tensor(confidence), torch.tensor(correct, dtype=torch.long)).item()
    if p == "1":
        ours = expected_calibration_error(confidence, correct)
    else:  # our bins of equal count, given the equal-width bins' members one bin at a time
        index = np.minimum((confidence * 15).astype(int), 14)
        gaps = [
            calibration_error(confidence[index == i], correct[index == i], "1", 10**6)
            for i in range(15)
        ]
        share = np.bincount(index, minlength=15) / len(index)
        ours = max(gaps) if p == "infty" else float(np.sqrt((share * np.square(gaps)).sum()))
    assert ours == pytest.approx(expected, abs=1e-5)


def test_order_and_ties_do_not_matter():
    rng = np.random.default_rng(1)
    confidence = rng.choice([0.1, 0.5, 0.50001, 0.9], 1000)
    correct = rng.random(1000) < 0.5
    for p in ("1", "2", "infty"):
        first = calibration_error(confidence, correct, p)
        order = rng.permutation(1000)
        assert calibration_error(confidence[order], correct[order], p) == pytest.approx(first)


@pytest.mark.parametrize("p", ["1", "2", "infty"])
def test_edges_are_defined(p):
    assert calibration_error([], [], p) is None
    assert calibration_error([1.0, 1.0], [1, 1], p) == 0.0
    assert calibration_error([0.0, 0.0], [0, 0], p) == 0.0
    assert calibration_error([1.0, 1.0], [0, 0], p) == 1.0
    assert calibration_error([0.25] * 3, [1, 1, 1], p) == pytest.approx(0.75)  # one class, n < beta


@pytest.mark.parametrize(
    ("confidence", "correct", "options", "message"),
    [
        ([0.5, float("nan")], [1, 0], {}, "1 of the confidences are not finite"),
        ([0.5, 1.5], [1, 0], {}, "outside"),
        ([0.5], [1, 0], {}, "shapes"),
        ([0.5], [2], {}, "0 and 1"),
        ([0.5], [1], {"p": "3"}, "must be 1, 2 or infty"),
        ([0.5], [1], {"beta": 0}, "beta"),
    ],
)
def test_invalid_input_is_refused(confidence, correct, options, message):
    with pytest.raises(ValueError, match=message):
        calibration_error(confidence, correct, **options)


def test_if_perfect_is_the_95th_percentile_of_perfect_models():
    rng = np.random.default_rng(3)
    confidence = rng.random(400)
    limit = calibration_error_if_perfect(confidence)
    errors = [calibration_error(confidence, rng.random(400) < confidence) for _ in range(1000)]
    assert np.mean(np.array(errors) <= limit) == pytest.approx(0.95, abs=0.02)
    assert calibration_error_if_perfect([]) is None
    ties = np.repeat([0.2, 0.5, 0.9], 100)
    limit = calibration_error_if_perfect(ties, "1")
    errors = [calibration_error(ties, rng.random(300) < ties, "1") for _ in range(1000)]
    assert np.mean(np.array(errors) <= limit) == pytest.approx(0.95, abs=0.02)


def scores_of(confidence, correct, emitted=None, extracted="yes"):
    tags = emitted or ["C" if c > 0.5 else "U" for c in confidence]
    return [
        Score(i, float(c), tag, bool(ok), extracted, "")
        for i, (c, ok, tag) in enumerate(zip(confidence, correct, tags))
    ]


def test_metrics_agree_with_scikit_learn():
    confidence, correct = sample(500)
    metrics = confidence_metrics(scores_of(confidence, correct))
    assert metrics["auroc"] == pytest.approx(roc_auc_score(correct, confidence))
    assert metrics["brier"] == pytest.approx(brier_score_loss(correct, confidence))
    assert metrics["nll"] == pytest.approx(log_loss(correct, confidence))
    assert metrics["accuracy"] == pytest.approx(((confidence > 0.5) == correct).mean())
    assert metrics["majority_accuracy"] == pytest.approx(max(correct.mean(), 1 - correct.mean()))
    assert metrics["num_samples"] == 500


def test_auroc_of_one_class_is_null():
    metrics = confidence_metrics(scores_of([0.2, 0.9], [True, True]))
    assert metrics["auroc"] is None
    assert metrics["majority_accuracy"] == 1.0


def test_missing_and_foreign_tags_count_as_wrong_and_are_still_scored():
    scores = scores_of([0.9, 0.9, 0.9, 0.1], [1, 1, 1, 0], emitted=["C", None, "other", "U"])
    metrics = confidence_metrics(scores)
    assert metrics["accuracy"] == 0.5
    assert metrics["missing_tag_rate"] == metrics["wrong_domain_rate"] == 0.25
    assert metrics["num_samples"] == 4
    assert metrics["mean_confidence"] == pytest.approx(0.7)


def test_no_scores_give_no_figures():
    assert confidence_metrics([]) == {"num_samples": 0}
