"""The strict ONNX importer."""
