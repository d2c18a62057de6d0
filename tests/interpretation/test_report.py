"""The report names every class in full, what the model confuses, and whether it learned anything."""

import copy
import re

import pytest
from commandline import ROOT

from cifar10.interpretation.metrics import summarize
from cifar10.interpretation.report import (
    as_page,
    balanced_accuracy,
    baseline,
    calibration,
    class_sections,
    escape,
    markdown_table,
    statements,
)
from cifar10.runs.run import Run


def sections(interp) -> str:
    return "\n\n".join(class_sections(interp, summarize(interp)))


def test_report_names_the_most_confused_pair(interp):
    actual, predicted, count = interp.most_confused()[0]
    assert f"| {actual} | {predicted} | {count} |" in sections(interp)


def test_report_keeps_whole_names_and_numbers_the_classes(interp):
    other = copy.copy(interp)
    other.names = [f"class {i} | " + "name " * 20 for i in range(10)]
    assert len([line for line in sections(other).splitlines() if line.startswith(r"| 3 | class 3 \| name")]) == 1


def test_a_cut_list_of_labels_to_check_says_so(interp):
    other = copy.copy(interp)
    other.decoded = interp.targs.clone()
    for wrong, said in ((20, "\n\nMisclassified images, ordered"), (21, "The first 20 of 21 misclassified images, ")):
        other.decoded[:wrong] = (interp.targs[:wrong] + 1) % 10
        assert said in sections(other)


def test_report_of_a_perfect_model_has_no_empty_table(interp):
    perfect = copy.copy(interp)
    perfect.targs = interp.decoded
    assert "100.0%" in sections(perfect) and "predicted" not in sections(perfect)


def test_the_report_on_cifar10s_test_images_has_the_accuracy_of_the_notebook(interp):
    run, metrics = Run.open(ROOT / "results/cifar10-best"), summarize(interp)
    assert "- The accuracy of the assignment's notebook is 92.69%." in statements(run, metrics, own=True)
    assert "notebook" not in statements(run, metrics, own=False)
    run.sha256 = "0" * 64  # of other images
    assert "notebook" not in statements(run, metrics, own=True)


def test_a_table_in_markdown():
    assert markdown_table(["a", "b"], [["x|y", 1]], right=1) == "| a | b |\n| --- | ---: |\n| x\\|y | 1 |"


@pytest.mark.parametrize(
    "name", ["<b>", "&lt;", "a_b_c", "*a*", "$x$", "[a](b)", "`a`", "a\\b", "![a](b.png)", "a|b", "~a~"]
)
def test_any_name_is_shown_as_it_is(name, tmp_path):
    page = as_page(f"# {escape(name)}\n\n{markdown_table(['class'], [[escape(name)]])}\n", tmp_path)
    shown = name.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    assert re.findall(r"<(?:title|h1|td)>(.*?)</", page) == [shown] * 3


@pytest.mark.parametrize(
    ("correct", "verdict"),
    [
        (60, ""),
        (59, ", which the model does not beat with confidence"),
        (41, ", which the model does not beat with confidence"),
        (40, ", which is better than the model"),
    ],
)
def test_a_model_that_knows_only_the_most_common_class(interp, correct, verdict):
    """Of 100 images, 60 correct ones are the fewest whose confidence interval (Wilson's) is above a half."""
    other = copy.copy(interp)
    other.targs = interp.targs[:1].new_tensor([0] * 50 + [1] * 40 + [2] * 10)
    other.decoded = other.targs.clone()
    other.decoded[correct:] = 3
    other.preds = interp.preds[:100]
    said = baseline(summarize(other))
    assert said == f"Always predicting the most common class of these images would give 50.00%{verdict}."


def test_nothing_beats_the_most_common_class_if_there_is_no_other():
    said = baseline(dict(most_common_class=1, accuracy_interval=(0.8, 1)))
    assert said == "Always predicting the most common class of these images would give 100.00%."


@pytest.mark.parametrize(("counts", "named"), [((5, 5), False), ((5, 0, 5), False), ((5, 4), True)])
def test_the_mean_recall_is_named_where_it_is_not_the_accuracy(counts, named):
    metrics = dict(macro=dict(recall=0.479), per_class={i: dict(images=count) for i, count in enumerate(counts)})
    said = "The mean recall of the classes, in which rare ones count as much as common ones, is 47.9%."
    assert balanced_accuracy(metrics) == (said if named else "")


@pytest.mark.parametrize(
    ("mean", "smoothing", "says"),
    [
        (
            0.85,
            0.1,
            r"too low, 85\.0% on average\. Label smoothing makes them so; the loss and this .*",
        ),
        (0.77, 0.1, r"too low, 77\.0% on average\. Label smoothing makes them so; .*"),
        (
            0.65,
            0.1,
            r"too low, 65\.0% on average\. Label smoothing is one cause, perhaps a short training another; .*",
        ),
        (0.85, 0.0, r"too low, 85\.0% on average\."),
        (0.97, 0.1, r"too high, 97\.0% on average\."),
    ],
)
def test_in_which_direction_probabilities_are_off(mean, smoothing, says):
    metrics = dict(accuracy=0.9, mean_probability=mean, calibration_error=abs(0.9 - mean), temperature=None)
    metrics |= dict(calibration_error_by_chance=0.03)
    said = calibration(metrics, smoothing)
    assert re.search(f"is {abs(0.9 - mean):.1%}: the probabilities are {says}$", said)


def test_probabilities_that_are_right_mixed_or_corrected():
    metrics = dict(accuracy=0.9, mean_probability=0.911, calibration_error=0.012, temperature=None)
    metrics |= dict(calibration_error_by_chance=0.012, images=500)
    said = "is 1.2%; with 500 images, a perfectly calibrated model can have as much by chance."
    assert calibration(metrics, 0.1).endswith(said)
    mixed = metrics | dict(calibration_error=0.14, mean_probability=0.85)
    said = "is 14.0%: some probabilities are too low and some too high; they are 85.0% on average."
    assert calibration(mixed, 0.1).endswith(said)
    metrics |= dict(temperature=0.5, calibration_error_with_temperature=0.004)
    assert "is 1.2%, and 0.4% with a temperature of 0.50, which was fitted" in calibration(metrics, 0.1)
