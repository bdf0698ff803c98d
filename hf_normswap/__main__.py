"""`python -m hf_normswap` is `normswap`."""

import sys

from .cli import main


if __name__ == "__main__":
    sys.exit(main())
