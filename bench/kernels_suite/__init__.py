"""The parts of the kernel benchmarks: bench/kernels.py and bench/gpu.py put them together.

Needs torch, NumPy and slipstream_kernels; matplotlib only for the picture, the peers only where installed.
"""
