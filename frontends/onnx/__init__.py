"""ONNX front end: a model file becomes a `Graph`, or a one-line reason why not."""

from cnnc.frontends.onnx.importer import import_model

__all__ = ["import_model"]
