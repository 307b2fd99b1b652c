"""Run the command line as `python -m gradpruner.cli`."""

import sys

from gradpruner.cli.main import main

sys.exit(main())
