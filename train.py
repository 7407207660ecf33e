"""Train, unlearn, test and compare: see `python train.py --help`."""

import sys

from salun_lightning.cli import console

if __name__ == "__main__":
    sys.exit(console())
