"""Recovery: what pruning cost, won back by training the weights that are left. Zeros stay zeros."""
