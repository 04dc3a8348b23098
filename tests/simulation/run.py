"""Runs many seeds, or repeats one: `python -m tests.simulation.run --seeds 100000`, `... --seed 17 --trace`."""

import sys

from tests.simulation.seeds import main
from tests.simulation.world import World

if __name__ == "__main__":
    sys.exit(main(World, __doc__))
