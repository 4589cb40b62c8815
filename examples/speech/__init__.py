"""A small speech recogniser on real speech, and the demo that trains it: `python -m examples.speech`."""
