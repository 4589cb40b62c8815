"""The training of the article that this project started from: `python -m examples.article`."""
