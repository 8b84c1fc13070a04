"""Entry point of ``python -m vpt_peft.convert``."""

from .command import main

if __name__ == "__main__":
    main()
