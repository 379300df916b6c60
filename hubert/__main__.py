"""`python -m hubert`: the command line without the service (`hubert.cli`)."""

import sys

from hubert.cli import main

sys.exit(main())
