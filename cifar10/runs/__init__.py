"""A run: its folder, its checkpoints, and the session that starts, resumes or restarts it."""

from cifar10.runs.run import WEIGHTS, Run

__all__ = ["WEIGHTS", "Run"]
