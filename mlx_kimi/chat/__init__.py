"""A conversation that is kept: turns, tools, sessions and their states on disk."""
