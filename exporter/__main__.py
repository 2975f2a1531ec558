"""`python -m exporter` is the `fp4export` command."""

import sys

from exporter.cli import main

if __name__ == "__main__":
    sys.exit(main())
