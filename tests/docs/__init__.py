"""README, docs and docstrings: their code runs, and what they link to and name is there."""
