"""What names the bytes of a server's blocks."""
