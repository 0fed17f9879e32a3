"""Speed and memory of the package against the plain way of doing the same: `python -m eval.speed --help`."""
