"""`python -m dlb_fast` is the `dlb-fast` command."""

import sys

from dlb_fast.cli import main

if __name__ == "__main__":
    sys.exit(main())
