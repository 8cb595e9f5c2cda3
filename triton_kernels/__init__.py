"""The Triton backend, installed as ``fused_adamw.triton_kernels``: rules, formats, and the one kernel of a step."""
