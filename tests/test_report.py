"""The report names what the model confuses."""

from cifar10.report import markdown_report


def test_report_names_the_most_confused_pair(interp):
    text = markdown_report(interp)
    actual, predicted, count = interp.most_confused()[0]
    assert f"| {actual} | {predicted} | {count} |" in text and f"{interp.accuracy:.2%}" in text
