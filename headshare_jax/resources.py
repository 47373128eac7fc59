"""Memory and disk: how much there is, whether it is enough, and how much was used."""

import resource
import shutil
import sys
from pathlib import Path

from headshare_jax.errors import HeadshareError

# A container's limit and use of memory, as Linux tells them (control groups, version 2).
_GROUP = Path("/sys/fs/cgroup")


def check_disk(folder: Path, needed: int, what: str) -> None:
    """Raises HeadshareError unless a folder's disk has room for so many bytes of something; a bucket always has."""
    if hasattr(folder, "protocol"):  # of a path in a bucket
        return
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise HeadshareError(
            f"{what} needs about {gigabytes(needed)} on the disk of {folder.resolve()}, which has {gigabytes(free)} "
            "left; make room, or choose another folder."
        )


def check_memory(needed: int, what: str, remedy: str) -> None:
    """Raises HeadshareError if something needs more bytes of memory than this machine has free, where that is known."""
    free = free_memory()
    if free is not None and free < needed:
        raise HeadshareError(
            f"{what} needs about {gigabytes(needed)} of memory, and {gigabytes(free)} is free; {remedy}."
        )


def free_memory() -> int | None:
    """Bytes of memory that can still be taken, within this container's limit too; None where it is not known."""
    return min((count for count in (_available(), _left_to_group()) if count is not None), default=None)


def peak_memory() -> int:
    """Most bytes of memory that this process has had so far."""
    kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return kilobytes if sys.platform == "darwin" else 1024 * kilobytes


def gigabytes(count: int) -> str:
    """Bytes in GB (10^9), or in MB below that."""
    return f"{count / 1e9:,.1f} GB" if count >= 1e9 else megabytes(count)


def megabytes(count: int) -> str:
    """Bytes in MB (10^6), to one decimal."""
    return f"{count / 1e6:,.1f} MB"


def _available() -> int | None:
    for line in _read(Path("/proc/meminfo")).splitlines():
        if line.startswith("MemAvailable:"):
            return 1024 * int(line.split()[1])
    return None


def _left_to_group() -> int | None:
    most, used = (_read(_GROUP / name).strip() for name in ("memory.max", "memory.current"))
    if not (most.isdigit() and used.isdigit()):
        return None
    # Pages of files count as used until another wants the room.
    kept = dict(line.split() for line in _read(_GROUP / "memory.stat").splitlines())
    return max(0, int(most) - int(used) + int(kept.get("file", 0)))


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
