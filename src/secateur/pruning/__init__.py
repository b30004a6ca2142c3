"""One run of pruning: its dry run, its preparation, the loop over blocks."""
