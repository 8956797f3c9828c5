"""Entry of `python -m vtpm.embedded_tpm`."""

import sys

from vtpm.embedded_tpm.main import main

if __name__ == "__main__":
    sys.exit(main())
