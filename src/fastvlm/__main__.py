"""`python -m fastvlm` is the `fastvlm` command."""

import sys

from fastvlm.cli import main

if __name__ == "__main__":
    sys.exit(main())
