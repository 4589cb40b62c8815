"""The step in plain torch: the specification, the oracle of the tests, and the fallback for tensors that the kernels do
not cover."""
