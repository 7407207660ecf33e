"""Train, unlearn, test and compare: see `python train.py --help`."""

from salun_lightning.cli import main

if __name__ == "__main__":
    main()
