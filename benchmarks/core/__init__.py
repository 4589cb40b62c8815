"""The parts that all benchmarks share: models, contenders, agreement, clocks, and the rows of a result."""
