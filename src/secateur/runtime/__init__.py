"""How packed weights are computed with on a CPU."""
