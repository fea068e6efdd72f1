"""The operators: one family a file, everything about an operator in its class."""
