"""Runs many seeds of chains, or one: `python -m tests.simulation.chain_run --seeds 9999`, `--seed 7 --trace`."""

import sys

from tests.simulation.chain_world import ChainWorld
from tests.simulation.seeds import main

if __name__ == "__main__":
    sys.exit(main(ChainWorld, __doc__))
