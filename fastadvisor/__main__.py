"""``python -m fastadvisor`` is the command ``fastadvisor``."""

import sys

from fastadvisor.cli import main

if __name__ == "__main__":
    sys.exit(main())
