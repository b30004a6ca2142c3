"""What a model is worth: perplexity. Knows nothing of pruning."""
