"""The two planes: control decides which blocks move where, data moves them."""
