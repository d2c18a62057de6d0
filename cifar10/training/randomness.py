"""The state of all random number generators that training draws from."""

import random
from typing import Any

import numpy as np
import torch
from fastai.data.core import DataLoaders

DEVICE_RNG = {"cuda": torch.cuda, "mps": torch.mps}  # devices with a random state of their own


def random_states(dls: DataLoaders) -> dict[str, Any]:
    """The states of all these generators: tensors for PyTorch and the device, values for JSON for the others."""
    numpy: Any = np.random.get_state()
    states: dict[str, Any] = dict(python=random.getstate(), numpy=[numpy[0], numpy[1].tolist(), *numpy[2:]])
    states |= dict(loaders=[dl.rng.getstate() for dl in (dls.train, dls.valid)], torch=torch.get_rng_state())
    device = DEVICE_RNG.get(dls.device.type)
    return states | (dict(device=device.get_rng_state()) if device else {})


def set_random_states(dls: DataLoaders, states: dict[str, Any]):
    """Restore what `random_states` returned."""
    np.random.set_state(tuple(states["numpy"]))
    generators = (random, dls.train.rng, dls.valid.rng)
    for generator, (kind, numbers, gauss) in zip(generators, [states["python"], *states["loaders"]], strict=True):
        generator.setstate((kind, tuple(numbers), gauss))  # JSON has no tuples
    torch.set_rng_state(states["torch"])
    if "device" in states and (device := DEVICE_RNG.get(dls.device.type)):
        device.set_rng_state(states["device"])
