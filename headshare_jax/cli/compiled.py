"""Compiled programs are kept in the cache folder, so that a restart compiles nothing."""

import hashlib
import os
import platform
import warnings
from contextlib import suppress
from pathlib import Path

import jax

from headshare_jax.convert.cache import cache_directory
from headshare_jax.convert.storage import make_folder
from headshare_jax.errors import HeadshareError


def keep_compiled_programs() -> None:
    """Has JAX keep what it compiles, however small; its own variables win.

    Nothing is kept where no folder can be made.
    """
    if "JAX_COMPILATION_CACHE_DIR" in os.environ:
        return
    with suppress(HeadshareError, OSError):
        folder = cache_directory() / "compiled" / _processor()
        make_folder(folder)
        jax.config.update("jax_compilation_cache_dir", str(folder))
        if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
            jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    # All is compiled where a bucket cannot be used, and no word is due.
    warnings.filterwarnings("ignore", "Error (reading|writing) persistent compilation cache")


def _processor() -> str:
    """Tells processors apart: JAX takes a program for one for all of them, and hosts may share the folder."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    told = {line for line in lines if line.startswith(("model name", "flags", "Features", "CPU part"))}
    return hashlib.sha256("\n".join([platform.machine(), *sorted(told)]).encode()).hexdigest()[:12]
