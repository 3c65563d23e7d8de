"""``python -m finetune101``, also under torchrun."""

import sys


def main() -> int:
    """The exit code of the command line; Ctrl-C counts from the first moment on."""
    try:
        from finetune101.cli.main import main as run
    except KeyboardInterrupt:
        return 130
    return run()


if __name__ == "__main__":  # worker processes import this module again
    sys.exit(main())
