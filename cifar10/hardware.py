"""The machine: device, precision and memory, and the versions and hardware that a result depends on."""

import ctypes
import platform
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from fastai.torch_core import default_device, num_distrib

from cifar10.errors import UserError

PACKAGES = ("torch", "torchvision", "fastai", "fastcore", "numpy", "pillow", "scikit-learn", "safetensors")
BF16 = ("amx_bf16", "avx512_bf16")  # instructions that compute in bfloat16, the faster ones first


def collect_env() -> dict[str, Any]:
    describe = ["git", "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty= with changes"]
    try:
        commit = subprocess.run(describe, cwd=Path(__file__).parent, capture_output=True, text=True).stdout.strip()
    except OSError:  # there is no git
        commit = ""
    cpu = torch.cpu.get_capabilities()
    return {
        "versions": {"python": platform.python_version(), **{package: version(package) for package in PACKAGES}},
        "hardware": {
            "machine": platform.machine(),
            "cpu": torch.backends.cpu.get_cpu_capability(),
            "cpu_model": cpu.get("cpu_name") or platform.processor(),
            "bf16": [name for name in BF16 if cpu.get(name)],
            "threads": torch.get_num_threads(),
            "processes": max(1, num_distrib()),
            "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        },
        "commit": commit or None,
    }


def get_device(device: str) -> torch.device:
    """`"auto"` is the fastest device here. Raises `UserError` for one that this machine does not have."""
    if device in ("cuda", "mps") and not getattr(torch, device).is_available():
        raise UserError(f"device is {device!r}, and PyTorch finds none here; use another device or machine")
    return default_device() if device == "auto" else torch.device(device)


M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of malloc.h


def keep_freed_memory():
    """Make glibc keep the memory that the process frees, until it ends. Does nothing with other C libraries.

    Otherwise it returns a step's large tensors to the system, and in the next step each page costs a page fault.
    """
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if hasattr(libc, "mallopt"):
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, -1)


def resolve_precision(precision: str, device: torch.device) -> str:
    """`"auto"` becomes the fastest precision that the device computes in hardware; any other one is checked."""
    possible = {"cpu": ("fp32", "bf16"), "cuda": ("fp32", "bf16", "fp16")}.get(device.type, ("fp32",))
    if precision != "auto":
        if precision not in possible:
            raise UserError(f"precision is {precision!r}; on {device.type} it must be auto, {' or '.join(possible)}")
        return precision
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    able = torch.cpu.get_capabilities()
    has_bf16 = able.get("avx512_bf16") or able.get("amx_tile")
    return "bf16" if device.type == "cpu" and has_bf16 else "fp32"
