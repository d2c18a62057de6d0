"""What a result may depend on besides options and recipe: versions, hardware, the commit of this repository."""

import platform
import subprocess
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from fastai.torch_core import num_distrib

PACKAGES = ("torch", "torchvision", "fastai", "fastcore", "numpy", "pillow", "scikit-learn", "safetensors")
BF16 = ("amx_bf16", "avx512_bf16")  # instructions that compute in bfloat16, the faster ones first


def collect_env() -> dict[str, Any]:
    describe = ["git", "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty= with changes"]
    try:
        commit = subprocess.run(describe, cwd=Path(__file__).parent, capture_output=True, text=True).stdout.strip()
    except OSError:  # there is no git
        commit = ""
    about = cpu_info()
    return {
        "versions": {"python": platform.python_version(), **{package: version(package) for package in PACKAGES}},
        "hardware": {
            "machine": platform.machine(),
            "cpu": torch.backends.cpu.get_cpu_capability(),
            "cpu_model": about.get("model name") or platform.processor(),
            "bf16": [name for name in BF16 if name in about.get("flags", "").split()],
            "threads": torch.get_num_threads(),
            "processes": max(1, num_distrib()),
            "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        },
        "commit": commit or None,
    }


def cpu_info() -> dict[str, str]:
    """What Linux says about the first core; other systems say nothing."""
    lines: list[str] = []
    with suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
    pairs = (line.split(":", 1) for line in lines if ":" in line)
    return {name.strip(): value.strip() for name, value in pairs}
