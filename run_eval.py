"""`python run_eval.py` is the console script `visionselector-eval`: see `python run_eval.py --help`."""

import sys

try:
    from visionselector_eval.harness.cli import main
except ModuleNotFoundError as error:
    if not (error.name or "").startswith("visionselector_eval"):
        raise
    sys.exit("visionselector-eval is not installed here: run `make install`, then .venv/bin/python run_eval.py")

if __name__ == "__main__":
    sys.exit(main())
