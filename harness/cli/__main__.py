"""`python -m visionselector_eval.harness.cli`."""

import sys

from visionselector_eval.harness.cli.commands import main

sys.exit(main())
