"""Measurements: `python -m benchmarks.speed`. Importing the package first lets it correct matplotlib's backend."""

import cifar10  # noqa: F401
