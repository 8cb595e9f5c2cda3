"""``python -m fused_adamw``: versions, and for each device which backends can run, and why the others cannot."""

import platform

import torch

import fused_adamw
from fused_adamw import backends


def main() -> None:
    print(f"fused_adamw {fused_adamw.__version__}, torch {torch.__version__}, Python {platform.python_version()}")
    if native := backends.native():
        best = native.cpu_isas()[-1]
        print(f"CPU kernels: {', '.join(native.cpu_isas())} ({best} is used), {torch.get_num_threads()} threads")
    for backend in backends.BACKENDS:
        devices = ", ".join(backend.devices) or "any device"
        print(f"backend {backend.name!r} ({devices}): {backend.missing() or 'available'}")
    for device in ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]:
        print(f"{device} tensors are stepped by {backends.pick(torch.device(device)).name!r}")


if __name__ == "__main__":
    main()
