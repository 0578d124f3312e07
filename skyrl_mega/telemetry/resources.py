"""What this process, and the processes it started, have used so far."""

from __future__ import annotations

import os
import resource
import sys
from pathlib import Path


def peak_rss_bytes() -> int:
    """Most resident memory this process ever held (on Linux: since its high-water mark was last reset)."""
    if sys.platform == "linux":
        # Not ru_maxrss, which survives exec: a small process started by a large one reports the large one's memory.
        return next(int(line.split()[1]) * 1024 for line in _status_lines() if line.startswith("VmHWM:"))
    return _max_rss_bytes(resource.RUSAGE_SELF)


def peak_rss_children_bytes() -> int:
    """Most resident memory of any single descendant that has ended and been waited for; 0 when there is none.

    On Linux at least what this process held when it started that descendant: the mark survives fork and exec.
    """
    return _max_rss_bytes(resource.RUSAGE_CHILDREN)


def reset_peak_rss() -> bool:
    """Starts `peak_rss_bytes` afresh from what is resident now. False where the system can't (anything but Linux)."""
    if sys.platform != "linux":
        return False
    Path("/proc/self/clear_refs").write_text("5")
    return True


def rss_bytes() -> int:
    """Resident memory of this process now."""
    import psutil

    return psutil.Process().memory_info().rss


def load_average() -> float:
    """Runnable processes of the machine, averaged over one minute."""
    return os.getloadavg()[0]


def _status_lines() -> list[str]:
    return Path("/proc/self/status").read_text().splitlines()


def _max_rss_bytes(who: int) -> int:
    # Linux counts KiB, macOS bytes.
    return resource.getrusage(who).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
