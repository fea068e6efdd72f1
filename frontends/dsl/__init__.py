"""The DSL: layers are values, `>>` chains them."""
