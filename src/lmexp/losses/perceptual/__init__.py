"""Frozen networks whose features say how alike two pictures look, one family a file."""
