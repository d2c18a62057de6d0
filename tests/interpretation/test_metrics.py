"""The numbers of the report agree with scikit-learn, with hand-made cases and with each other."""

import copy

import numpy as np
import pytest
import sklearn.metrics as skm
import torch

from cifar10.interpretation.metrics import (
    calibration_error,
    calibration_error_by_chance,
    confidence_interval,
    fit_temperature,
    likely_label_errors,
    macro,
    per_class,
    reliability,
    summarize,
    with_temperature,
)


def test_per_class(interp):
    """By hand from the confusion matrix."""
    matrix, rows = interp.confusion_matrix(), per_class(interp)
    assert rows["3"]["recall"] == pytest.approx(matrix[3, 3] / matrix[3].sum())
    assert rows["3"]["precision"] == pytest.approx(matrix[3, 3] / matrix[:, 3].sum())
    assert rows["3"]["f1"] == pytest.approx(2 * matrix[3, 3] / (matrix[3].sum() + matrix[:, 3].sum()))
    assert rows["3"]["images"] == matrix[3].sum() and sum(row["images"] for row in rows.values()) == matrix.sum()
    assert macro(interp)["f1"] == pytest.approx(skm.f1_score(interp.targs, interp.decoded, average="macro"))


def test_a_class_without_images_has_no_recall(interp):
    other = copy.copy(interp)
    other.targs = interp.targs.clone()
    other.targs[other.targs == 3] = 4
    rows, means = per_class(other), macro(other)
    assert rows["3"]["recall"] is None and rows["3"]["images"] == 0
    assert means["recall"] == pytest.approx(np.mean([r["recall"] for n, r in rows.items() if n != "3"]))


def test_the_confidence_interval(interp):
    """81 of 263 correct give 0.2553 to 0.3662 by Wilson's score, an example of Newcombe, 1998."""
    other = copy.copy(interp)
    other.targs = torch.zeros(263, dtype=torch.long)
    other.decoded = (torch.arange(263) >= 81).long()
    assert confidence_interval(other) == pytest.approx((0.2553, 0.3662), abs=1e-4)
    other.decoded = other.targs
    assert confidence_interval(other)[1] == 1


def test_calibration_by_hand():
    preds = torch.tensor([[0.9, 0.1]] * 10 + [[0.4, 0.6]] * 10)
    targs = torch.tensor([0] * 9 + [1] + [1] * 3 + [0] * 7)
    assert calibration_error(preds, targs) == pytest.approx(0.5 * 0.0 + 0.5 * 0.3, abs=1e-6)
    assert reliability(preds, targs).images.tolist() == [10, 10]
    assert calibration_error(torch.tensor([[1.0, 0.0]]), torch.tensor([0])) == 0  # the last bin holds its end


@pytest.mark.parametrize("count", [50, 2000])
def test_one_perfectly_calibrated_model_in_twenty_has_more_error_than_by_chance(count):
    generator = torch.Generator().manual_seed(0)
    preds = torch.randn(count, 5, generator=generator).mul(2).softmax(dim=1)
    limit = calibration_error_by_chance(preds)
    errors = [calibration_error(preds, torch.multinomial(preds, 1, generator=generator)[:, 0]) for _ in range(200)]
    assert 0.01 < np.mean(np.array(errors) > limit) < 0.1
    assert 0.5 < limit * count**0.5 < 2  # it falls as the square root of the number of images


def test_the_temperature_undoes_a_scaling():
    """Logits that are three times too large, with labels drawn from the right probabilities."""
    torch.manual_seed(0)
    logits = torch.randn(4000, 5)
    targs = logits.softmax(1).multinomial(1).flatten()
    preds = (3 * logits).softmax(1)
    temperature = fit_temperature(preds, targs)
    assert temperature == pytest.approx(3, rel=0.1)  # 2.94 to 3.13 with 12 seeds
    assert calibration_error(with_temperature(preds, temperature), targs) < 0.03 < calibration_error(preds, targs)
    torch.testing.assert_close(with_temperature(preds, 3.0), logits.softmax(1), atol=1e-4, rtol=1e-3)


def test_a_summary(interp):
    metrics = summarize(interp)
    low, high = metrics["accuracy_interval"]
    assert low < metrics["accuracy"] == interp.accuracy < high and metrics["images"] == 360
    assert metrics["temperature"] is None and "calibration_error_with_temperature" not in metrics
    assert summarize(interp, 2.0)["calibration_error_with_temperature"] != metrics["calibration_error"]


def test_planted_label_errors_are_found(interp):
    """Of images of which the model is sure, five get a wrong label; it is less sure of its own mistakes."""
    torch.manual_seed(0)
    other = copy.copy(interp)
    other.decoded = torch.randint(10, (200,))
    sure = torch.full((200,), 0.9)
    wrong, planted = torch.arange(20), torch.arange(50, 55)
    sure[wrong] = torch.linspace(0.3, 0.8, 20)
    other.preds = ((1 - sure) / 9)[:, None].repeat(1, 10).scatter(1, other.decoded[:, None], sure[:, None])
    other.targs = other.decoded.clone()
    other.targs[torch.cat([wrong, planted])] = (other.decoded[torch.cat([wrong, planted])] + 1) % 10
    found = likely_label_errors(other, 5)
    assert {*found.tolist()} == {*planted.tolist()}
    assert (other.decoded[found] != other.targs[found]).all()
    assert likely_label_errors(other, 100).tolist()[5:] == wrong.flip(0).tolist()  # then its mistakes, the surest first
