"""The calls of the CUDA driver that KVortex needs, on raw handles."""
