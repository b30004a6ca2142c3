"""A grid of prunings in one folder, and the papers' table of it."""
