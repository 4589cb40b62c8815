"""A small Conformer adapted to a new voice in little memory, as on a board with 4 GB."""
