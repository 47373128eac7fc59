"""How tests compile, and where programs are kept, for the next run and for the other workers of this one."""

import hashlib
import os
import platform
from importlib.metadata import version
from pathlib import Path

CACHE = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "headshare-jax-tests"
DAYS_KEPT = 14

# Fusions as XLA's older emitters write them, which compiles three times as fast; libtpu knows no such flag.
QUICK_FUSIONS = " --xla_cpu_use_fusion_emitters=false"


def flags(devices: int) -> str:
    """XLA's flags of a process of some devices, which compiles far more than it computes."""
    return f"--xla_force_host_platform_device_count={devices} --xla_backend_optimization_level=0{QUICK_FUSIONS}"


def folder() -> Path:
    """The folder of this processor and release.

    JAX finds a program by all of its text, XLA's flags and the release of jaxlib, so that changed code never meets an
    old one. The folder is named by what that leaves out: JAX's release, and the processor that programs are made for.
    """
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    processor = sorted({line for line in lines if line.startswith(("model name", "flags", "Features", "CPU part"))})
    made_by = [version("jax"), version("jaxlib"), platform.machine(), platform.processor(), *processor]
    return CACHE / hashlib.sha256("\n".join(made_by).encode()).hexdigest()[:16]
