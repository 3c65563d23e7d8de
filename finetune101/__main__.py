"""``python -m finetune101``, also under torchrun."""

import sys

from finetune101.cli import main

if __name__ == "__main__":  # worker processes import this module again
    sys.exit(main())
