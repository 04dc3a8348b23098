"""The CUDA driver: the calls that are needed, on raw handles."""
