"""The effect of clipping on training: `python -m studies.clipping`. Its results are read in docs/clipping.md."""
