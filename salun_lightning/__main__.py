"""``python -m salun_lightning``."""

import sys

from salun_lightning.cli import console

if __name__ == "__main__":
    sys.exit(console())
