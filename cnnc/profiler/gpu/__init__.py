"""Checks and times on a GPU: what was built elsewhere is run, compared and measured beside PyTorch."""
