"""The mathematics of pruning: torch only; no model, no file, no device policy."""
