"""The kind of machine that a run is made on: nothing that names one, and nothing secret."""

import os
import platform
from typing import Any

import psutil
import torch

from controlllm.fingerprint import version

LIBRARIES = ("controlllm", "torch", "transformers", "accelerate", "peft", "bitsandbytes", "torchao", "flash-attn")


def environment(device: torch.device) -> dict[str, Any]:
    """Device, cores and memory (GB) of this process's machine, and the versions of what it trains with."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU ({platform.machine()})"
    found = {library: version(library) for library in LIBRARIES}
    return {
        "device": name,
        "cuda": torch.version.cuda if device.type == "cuda" else None,
        "cores": os.cpu_count(),
        "memory_gb": round(psutil.virtual_memory().total / 1e9, 1),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "versions": {library: found[library] for library in LIBRARIES if found[library]},
    }
