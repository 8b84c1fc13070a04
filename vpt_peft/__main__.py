"""Entry point of ``python -m vpt_peft``."""

import sys

from .recipes.command import main

if __name__ == "__main__":
    sys.exit(main())
