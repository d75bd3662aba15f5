"""Floor 3. Kernels in Triton, one module an op; each imports triton, so only a chosen backend loads it."""
