"""``python -m salun_lightning``."""

from salun_lightning.cli import main

if __name__ == "__main__":
    main()
