"""`python -m kvortex` is the `kvortex` command."""

import sys

from kvortex.cli.main import main

sys.exit(main())
