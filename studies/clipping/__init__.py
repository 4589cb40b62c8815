"""What clipping does to training: `python -m studies.clipping`. Its results are read in docs/clipping.md."""
