"""What a model learned: predictions, Grad-CAM, metrics, plots, reports, and the model as an image classifier."""

from cifar10.interpretation.classifier import ImageClassifier
from cifar10.interpretation.gradcam import grad_cam
from cifar10.interpretation.page import report_run, write_html
from cifar10.interpretation.plots import GRADCAM_LAYERS, plot_explained
from cifar10.interpretation.predictions import Interpretation, tta_accuracy
from cifar10.interpretation.report import write_report

__all__ = [
    "GRADCAM_LAYERS",
    "ImageClassifier",
    "Interpretation",
    "grad_cam",
    "plot_explained",
    "report_run",
    "tta_accuracy",
    "write_html",
    "write_report",
]
