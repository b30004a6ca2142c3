"""What to prune and how, decided before anything changes."""
