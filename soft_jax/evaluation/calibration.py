"""Whether a probability is one: temperatures fitted on held-out images, and calibration counted.

An answer given with probability p should be right in a share p of the cases. A rule's probabilities
are its `log_probabilities` divided by a temperature and normalized again
(`inference.rules.probabilities`; Guo et al., 2017). The temperature is fitted on the images held
out for validation, and is 1 where none are: training images, which the network knows, would make it
far too sure.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import scipy.special

BINS = 15  # equal parts of [0, 1], as the expected calibration error is usually given
_RANGE = (0.05, 20.0)  # of temperatures


def fit_temperature(log_probabilities: np.ndarray, labels: np.ndarray) -> float:
    """Return the temperature that makes the `labels` int `[N]` most likely.

    `log_probabilities` are `[N, classes]`. Images whose own class can't win are left out; the
    temperature is 1 where no image is left.
    """
    from scipy.optimize import minimize_scalar  # few need it; it takes long to import

    true = log_probabilities[np.arange(len(labels)), labels]
    able = np.isfinite(true)
    if not able.any():
        return 1.0
    logs, true = log_probabilities[able].astype(np.float64), true[able].astype(np.float64)

    def loss(log_temperature: float) -> float:
        scaled = logs / np.exp(log_temperature)
        return float(
            np.mean(scipy.special.logsumexp(scaled, axis=1) - true / np.exp(log_temperature))
        )

    found = minimize_scalar(loss, bounds=np.log(_RANGE), method="bounded")
    return float(np.exp(found.x))


def count(probability: np.ndarray, correct: np.ndarray) -> dict[str, list[float]]:
    """Count answers by their probability.

    `probability` `[N]` is what the answers were given with, `correct` bool `[N]`.

    Returns:
        `{"count", "confidence", "correct"}`, each of `BINS` numbers: the answers whose probability
        is in the bin, the sum of their probabilities, and how many were right.
    """
    bins = np.minimum((probability * BINS).astype(int), BINS - 1)
    return {
        "count": np.bincount(bins, minlength=BINS).tolist(),
        "confidence": np.bincount(bins, probability, BINS).tolist(),
        "correct": np.bincount(bins, correct, BINS).astype(int).tolist(),
    }


def expected_error(counts: Mapping[str, Sequence[float]]) -> float:
    """Return the expected calibration error (ECE), in percent.

    That is Σ_b |right_b − Σ p_b| / N over the bins of `count`: how far, on average, the share of
    right answers is from the probability that they were given with.
    """
    right, confidence = (np.asarray(counts[name], float) for name in ("correct", "confidence"))
    return float(100 * np.abs(right - confidence).sum() / max(sum(counts["count"]), 1))
