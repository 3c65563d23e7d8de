"""Test loss and accuracy of a trained network: python test.py --exp NAME."""

import sys

from finetune101.original import test

if __name__ == "__main__":
    sys.exit(test())
