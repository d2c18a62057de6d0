"""Numbers of a report: precision, recall and F1 per class, confidence intervals, calibration."""

from typing import Any

import numpy as np
import pandas as pd
import sklearn.metrics as skm
import torch
from scipy.optimize import minimize_scalar
from scipy.stats import binomtest
from torch import Tensor
from torch.nn import functional as F

from cifar10.interpretation.predictions import Interpretation

BINS = 15  # of confidence, as in Guo et al.


def per_class(interp: Interpretation) -> dict[str, dict[str, float | int | None]]:
    """Class → precision, recall, F1 and number of images; `None` where there is nothing to divide by."""
    labels, keys = range(len(interp.names)), ["precision", "recall", "f1", "images"]
    scores = skm.precision_recall_fscore_support(interp.targs, interp.decoded, labels=labels, zero_division=np.nan)
    table = pd.DataFrame(scores, index=keys, columns=interp.names).astype(object)
    return table.where(table.notna(), None).to_dict()


def macro(interp: Interpretation) -> dict[str, float]:
    """The means of precision, recall and F1 over the classes that have images.

    A value that is undefined, such as the precision of a class that is never predicted, counts as 0.
    """
    found = interp.targs.unique()
    means = skm.precision_recall_fscore_support(
        interp.targs, interp.decoded, labels=found, average="macro", zero_division=0
    )
    return dict(zip(("precision", "recall", "f1"), map(float, means[:3])))


def confidence_interval(interp: Interpretation) -> tuple[float, float]:
    """The 95% confidence interval of the accuracy."""
    return wilson(int((interp.decoded == interp.targs).sum()), len(interp.targs))


def wilson(correct: int, images: int) -> tuple[float, float]:
    """The 95% confidence interval of a share, by Wilson's score."""
    low, high = binomtest(correct, images).proportion_ci(0.95, method="wilson")
    return float(low), float(high)


def bin_numbers(confidence: Tensor) -> np.ndarray:
    return (confidence * BINS).long().clamp_max(BINS - 1).numpy()


def reliability(preds: Tensor, targs: Tensor) -> pd.DataFrame:
    """Mean `confidence`, `accuracy`, `correct` and number of `images` of each bin of confidence that has images."""
    confidence, decoded = preds.max(dim=1)
    bins = bin_numbers(confidence)
    images = pd.DataFrame({"confidence": confidence.double(), "correct": decoded == targs, "images": 1})
    table = images.groupby(bins).agg({"confidence": "mean", "correct": "sum", "images": "sum"})
    return table.assign(accuracy=table.correct / table.images)


def calibration_error(preds: Tensor, targs: Tensor) -> float:
    """Expected calibration error: the mean difference between confidence and accuracy, over the bins of confidence.

    Source: Guo et al., "On Calibration of Modern Neural Networks", 2017.
    """
    bins = reliability(preds, targs)
    return float(np.average((bins.confidence - bins.accuracy).abs(), weights=bins.images))


def calibration_error_by_chance(preds: Tensor) -> float:
    """The calibration error that only 5% of perfectly calibrated models exceed if they give these probabilities.

    With few images it is large, because each bin has few of them. It is estimated from 200 such models.
    """
    confidence, rng = preds.amax(dim=1), np.random.default_rng(0)
    bins, probability = bin_numbers(confidence), confidence.double().numpy()
    drawn = ((rng.random(len(bins)) < probability) - probability for _ in range(200))
    errors = [np.abs(np.bincount(bins, differences)).sum() / len(bins) for differences in drawn]
    return float(np.quantile(errors, 0.95))


def log_probabilities(preds: Tensor) -> Tensor:
    """The logits, up to a constant for each image."""
    return preds.clamp_min(torch.finfo(preds.dtype).tiny).log()


def fit_temperature(preds: Tensor, targs: Tensor) -> float | None:
    """The number to divide the logits by for the lowest cross-entropy. Fit it on held-out images.

    `None` if it is not between 1/10 and 10: few images, or too many mistakes or none, determine no temperature.
    """
    logits = log_probabilities(preds.double())

    def loss(log_t: float) -> float:
        return F.cross_entropy(logits / np.exp(log_t), targs).item()

    temperature = float(np.exp(minimize_scalar(loss, bounds=(-3, 3), method="bounded").x))
    return temperature if 0.1 < temperature < 10 else None


def with_temperature(preds: Tensor, temperature: float) -> Tensor:
    return (log_probabilities(preds) / temperature).softmax(dim=1)


def summarize(interp: Interpretation, temperature: float | None = None) -> dict[str, Any]:
    """The metrics of an `Interpretation`, as in metrics.json."""
    metrics = dict(
        accuracy=interp.accuracy,
        mean_probability=interp.preds.amax(dim=1).double().mean().item(),  # of the predicted classes
        accuracy_interval=confidence_interval(interp),
        most_common_class=interp.targs.bincount().max().item() / len(interp.targs),  # its share of the images
        loss=interp.losses.mean().item(),
        images=len(interp.targs),
        macro=macro(interp),
        calibration_error=calibration_error(interp.preds, interp.targs),
        calibration_error_by_chance=calibration_error_by_chance(interp.preds),
        temperature=temperature,
    )
    if temperature:
        preds = with_temperature(interp.preds, temperature)
        metrics["calibration_error_with_temperature"] = calibration_error(preds, interp.targs)
    return metrics | dict(per_class=per_class(interp))


def likely_label_errors(interp: Interpretation, count: int) -> Tensor:
    """Misclassified images, most confident first: the rows of `count` candidates for wrong labels.

    They are ordered by how much likelier the predicted class is than the label. The list is meaningful for images that
    the model has not been trained on.
    Source: Northcutt et al., "Confident Learning: Estimating Uncertainty in Dataset Labels", 2021.
    """
    wrong = interp.misclassified()
    margin = interp.preds[wrong].amax(dim=1) - interp.preds[wrong, interp.targs[wrong]]
    return wrong[margin.argsort(descending=True, stable=True)][:count]
