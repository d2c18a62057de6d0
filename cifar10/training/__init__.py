"""From a recipe to a trained model: the Learner and its callbacks, Muon, the LR finder."""

from cifar10.training.callbacks import StopAtNaN, StopAtSignal, TimeEstimate, ValidateLast
from cifar10.training.initialize import init_pretrained, initialize
from cifar10.training.learner import build_learner
from cifar10.training.lr_finder import find_lrs
from cifar10.training.transfer import fit_head
