"""The CUDA back end: kernels as CUDA source through TVM, machine code through nvcc."""
