"""ESPnet's own training program on spoken digits, as it is and under `python -m fastclip.run`."""
