"""Each OpenMP thread on a CPU of its own."""

import os
import sys


def pin() -> None:
    """Start this program anew, on Linux, with a CPU for each thread, unless the caller has decided on that.

    Two threads that the scheduler packs on one CPU run at the speed of one, and OpenMP reads its variables only when
    it is loaded, hence before torch is imported.
    """
    if sys.platform != "linux" or {"OMP_PROC_BIND", "OMP_PLACES"} & os.environ.keys():
        return
    places = ",".join(f"{{{cpu}}}" for cpu in sorted(os.sched_getaffinity(0)))
    environment = {**os.environ, "OMP_PROC_BIND": "true", "OMP_PLACES": places}
    os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], environment)
