"""``python -m hypergrad`` is the command ``hypergrad``."""

import sys

from hypergrad.cli.entry import main

if __name__ == "__main__":
    sys.exit(main())
