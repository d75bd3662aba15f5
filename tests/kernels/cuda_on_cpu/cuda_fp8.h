// Kernels convert to e4m3 by their own code before sm_89, and here.
