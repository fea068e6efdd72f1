"""The operators: one family a file, everything about an operator in its class.

Importing this package registers every operator and every ONNX reader; it needs numpy only.
"""
