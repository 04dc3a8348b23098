"""The `kvortex` command."""
