"""What a GPU has to show, in parts of minutes that can be resumed: `python -m eval.gpu --help`."""
