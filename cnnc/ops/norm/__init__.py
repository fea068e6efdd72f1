"""Normalisation: batch, layer, channel, RMS, instance and group norm, and division by the p-norm."""

from cnnc.ops.norm import onnx_readers  # noqa: F401  (registers itself)
from cnnc.ops.norm.batch import BatchNorm
from cnnc.ops.norm.channel import ChannelNorm
from cnnc.ops.norm.layer import LayerNorm, RmsNorm
from cnnc.ops.norm.lp import LpNormalize
from cnnc.ops.norm.spatial import GroupNorm, InstanceNorm

__all__ = ["BatchNorm", "ChannelNorm", "GroupNorm", "InstanceNorm", "LayerNorm", "LpNormalize", "RmsNorm"]
