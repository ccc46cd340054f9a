"""`python -m ipgo` is `ipgo`, for a machine whose PATH does not have it."""

import sys

from ipgo.cli import main

if __name__ == "__main__":
    sys.exit(main())
