"""How a small ResNet is trained on CIFAR-10 with fastai: data, optimizer, Learner, run folder, plots.

The scripts beside this package pass in the model (model.py) and the transforms (augment.py); nothing here imports them.
"""

import os
import sys

# A notebook hands its plotting backend down to `!python train.py`, and matplotlib can't be imported there with it.
if "IPython" not in sys.modules and os.environ.get("MPLBACKEND", "").startswith("module://"):
    os.environ["MPLBACKEND"] = "agg"
