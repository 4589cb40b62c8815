"""The file of a result."""

import json
import re


def write(found, path):
    """JSON with every list of numbers on one line."""
    text = json.dumps({"schema": 1, **found}, indent=1)
    path.write_text(re.sub(r"\[[-+\d.eE,\s]*\]", lambda numbers: " ".join(numbers[0].split()), text) + "\n")
