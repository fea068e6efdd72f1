"""Passes: graph in, graph out, one pass a file; `pipeline` is the table of contents."""
