"""The host side of a binary: llvmlite driver, C runtime, linking."""
