"""What back ends share between a scheduled graph and machine code.

Tensor expressions from operators (`vocabulary`, `kernel`, `stages`), TVM's passes as they should be (`flatten`,
`temporaries`, `vector_math`), templates and what a kernel is known by, and programs from compiled kernels (`build`).
"""
