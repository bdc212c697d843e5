"""The cases run in a process for each backend, started by `test_backends.py`."""

import os

collect_ignore = [] if "NORMKIT_KERAS_CASES" in os.environ else ["cases"]
