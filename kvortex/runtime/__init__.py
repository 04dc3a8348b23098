"""Process-wide services: blocking work on threads, loops on threads, compiled code and its cache."""
