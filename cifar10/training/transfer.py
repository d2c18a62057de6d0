"""Transfer learning: the last layer is fitted to new classes before all layers are trained."""

import warnings

import numpy as np
import torch
from fastai.callback.hook import hook_output
from fastai.vision.all import Learner, get_model
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression

MOST = 5_000  # training images for the logistic regression, whose time grows with their number
C = 0.1  # its inverse regularization strength, on standardized features; the best one differs between data sets


@torch.no_grad()
def features(learn: Learner, files: list) -> tuple[np.ndarray, np.ndarray]:
    """The inputs of the last layer for images without augmentation, `(N, features)`, and their labels, `(N,)`."""
    dl, model = learn.dls.test_dl(files, with_labels=True), get_model(learn.model)
    found, labels = [], []
    model.eval()
    with hook_output(model.pool) as hook:
        for x, y in dl:
            model(x)
            found.append(hook.stored.flatten(1).float().cpu())
            labels.append(y.cpu())
    return torch.cat(found).numpy(), torch.cat(labels).numpy()


def fit_head(learn: Learner):
    """Fit the last layer by logistic regression on the features of the layers before it, without augmentation.

    Training that starts from random weights in the last layer would first distort the features.
    Source: Kumar et al., "Fine-Tuning can Distort Pretrained Features and Underperform Out-of-Distribution", 2022.
    """
    files = learn.dls.train_ds.items
    order, dl = np.random.default_rng(0).permutation(len(files)), learn.dls.train
    some = np.arange(min(MOST, len(files)))
    if hasattr(dl, "targets"):  # fastai's own loaders would have to read all images
        some = np.union1d(some, np.unique(dl.targets[0].cpu()[order], return_index=True)[1])  # of each class the first
    x, y = features(learn, [files[i] for i in order[some]])
    mean, std = x.mean(axis=0), x.std(axis=0) + 1e-6
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        balance = "balanced" if getattr(learn.dls.train, "weighted", False) else None
        fitted = LogisticRegression(C=C, max_iter=1000, class_weight=balance).fit((x - mean) / std, y)
    weight = fitted.coef_ / std
    bias = fitted.intercept_ - weight @ mean
    if len(fitted.classes_) == 2:  # scikit-learn has one output for both
        weight, bias = np.concatenate([-weight, weight]) / 2, np.concatenate([-bias, bias]) / 2
    model = get_model(learn.model)
    with torch.no_grad():
        model.fc.weight.zero_()
        model.fc.bias.fill_(float(bias.min()) / model.logit_scale)  # of a class without images
        model.fc.weight[fitted.classes_] = torch.from_numpy(weight).to(model.fc.weight) / model.logit_scale
        model.fc.bias[fitted.classes_] = torch.from_numpy(bias).to(model.fc.bias) / model.logit_scale
