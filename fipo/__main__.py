"""`python -m fipo` is the command `fipo`."""

import sys

from fipo.cli import main

sys.exit(main())
