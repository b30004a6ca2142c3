"""What a model is worth: perplexity, agreement, tasks, continuations. Knows nothing of pruning."""
