"""The graph IR: types, graphs, the one door to make nodes, text form, verifier, interpreter."""
