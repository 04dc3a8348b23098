"""Blocks in a bucket of S3 or of a compatible store, many to an object, found without a request for each of them.

Private: it may change in any release; docs/api.md lists what is public.
"""

from kvortex.tiers.s3.tier import S3Tier

__all__ = ["S3Tier"]
