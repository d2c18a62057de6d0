"""The report names every class in full, and what the model confuses."""

import copy

from cifar10.interpretation.metrics import summarize
from cifar10.interpretation.report import markdown_report


def test_report_names_the_most_confused_pair(interp):
    text = markdown_report(interp, summarize(interp), "images")
    actual, predicted, count = interp.most_confused()[0]
    assert f"| {actual} | {predicted} | {count} |" in text and f"{interp.accuracy:.2%}" in text


def test_report_keeps_whole_names_and_numbers_the_classes(interp):
    other = copy.copy(interp)
    other.names = [f"class {i} | " + "name " * 20 for i in range(10)]
    lines = markdown_report(other, summarize(other), "images").splitlines()
    assert len([line for line in lines if line.startswith("| 3 | class 3 ")]) == 1


def test_report_of_a_perfect_model_has_no_empty_table(interp):
    perfect = copy.copy(interp)
    perfect.targs = interp.decoded
    text = markdown_report(perfect, summarize(perfect), "images")
    assert "100.00%" in text and "predicted" not in text
