"""`python -m chatserve`: the command line, where the `chatserve` script is not on PATH."""

import sys

from chatserve.cli.main import main

sys.exit(main())
