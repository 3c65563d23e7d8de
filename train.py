"""Fine-tune an ImageNet network on Caltech-101: python train.py --exp NAME [--no-pretrain] [--lr ...]."""

import sys

from finetune101.original import train

if __name__ == "__main__":
    sys.exit(train())
