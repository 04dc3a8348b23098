"""The identity of a server's blocks: everything that must agree for their bytes to be reusable."""
