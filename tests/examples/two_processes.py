"""Runs examples one after the other: ``torchrun two_processes.py '{"name": ["--option", "value"]}'``."""

import json
import sys
from importlib import import_module

if __name__ == "__main__":
    for name, options in json.loads(sys.argv[1]).items():
        import_module(name).main(options)
