"""A run: its folder, its checkpoints, and the session that starts, resumes or restarts it."""

from cifar10.runs.run import WEIGHTS, Run, find_run, home_relative, weights_file
from cifar10.runs.session import Session
