"""`python -m hubert`: the command line without the service (`hubert.cli.main`)."""

import sys

from hubert.cli.main import main

sys.exit(main())
