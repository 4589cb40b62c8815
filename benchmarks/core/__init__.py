"""What all benchmarks measure with: models, contenders, agreement, clocks, and the rows of a result."""
