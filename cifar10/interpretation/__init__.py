"""What a model learned: predictions, Grad-CAM, metrics, plots, reports, and the model as an image classifier."""

from cifar10.interpretation.classifier import ImageClassifier
from cifar10.interpretation.fonts import shorten_middle
from cifar10.interpretation.gradcam import GRADCAM_LAYERS
from cifar10.interpretation.plots import overlay, plot_image_grad_cam
from cifar10.interpretation.predictions import Interpretation, tta_accuracy
from cifar10.interpretation.report import NOTEBOOK_LOG, markdown_table, report_run, write_report
from cifar10.interpretation.webpage import read_runtime, write_page
