"""`python -m normkit.cli`, where the script is not installed."""

import sys

from normkit.cli import main

sys.exit(main())
