"""Tensor expressions from operators: the vocabulary they are written in, and kernels from their bodies."""
