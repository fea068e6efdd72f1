"""Resizing: the operator, its exact coordinates, and the ONNX readers of Resize and Upsample."""

from cnnc.ops.resize import onnx_readers  # noqa: F401  (registers itself)
from cnnc.ops.resize.operator import Resize

__all__ = ["Resize"]
