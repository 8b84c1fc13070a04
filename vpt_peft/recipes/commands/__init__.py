"""The subcommands of ``vpt-peft``, one module each, imported when they are run."""
