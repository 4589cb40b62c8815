"""The tests of the step with each torch and each Python that is supported: python -m tests.matrix."""
