"""The `kvortex` command.

Private: it may change in any release; docs/api.md lists what is public.
"""

from kvortex.config import KIB

REPLAY_BLOCK_BYTES = 4 * KIB
"""Size of a block in the cache of a replay: small, so that a trace of long prompts fits on any machine."""
