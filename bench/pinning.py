"""Pin each OpenMP thread to a CPU of its own."""

import os
import sys


def pin() -> None:
    """Start this program anew, on Linux, with a CPU for each thread, unless the caller has decided on that.

    Two threads that the scheduler packs on one CPU run at the speed of one, and OpenMP reads its variables only when
    it is loaded, hence before torch is imported. The main thread may run on all CPUs, since the processes that it
    starts, compilers among them, inherit its affinity; it stays on the CPU that the other threads leave free.
    """
    if sys.platform != "linux" or {"OMP_PROC_BIND", "OMP_PLACES"} & os.environ.keys():
        return
    cpus = sorted(os.sched_getaffinity(0))
    places = [cpus, *([cpu] for cpu in cpus[1:])]
    named = ",".join(f"{{{','.join(map(str, place))}}}" for place in places)
    environment = {**os.environ, "OMP_PROC_BIND": "true", "OMP_PLACES": named}
    os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], environment)
