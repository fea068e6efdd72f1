"""CPU kernels: templates, their schedules and code generation through TVM."""
