"""The kernels behind the operators: one module a backend, each with the same functions and arguments."""
