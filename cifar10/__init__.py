"""How a small ResNet is trained on CIFAR-10 with fastai: data, optimizer, Learner, run folder, plots.

The scripts beside this package pass in the model (model.py) and the transforms (augment.py); nothing here imports them.
"""
