"""Runs many lives around an owner, or repeats one.

`python -m tests.simulation.owner_run --seeds 10000`, `... --seed 17 --trace`.
"""

import sys

from tests.simulation.owner_world import OwnerWorld
from tests.simulation.seeds import main

if __name__ == "__main__":
    sys.exit(main(OwnerWorld, __doc__))
