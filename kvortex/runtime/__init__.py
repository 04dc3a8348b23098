"""What the package needs of the process that it runs in: threads, loops, compiled code and where it is kept."""
