"""How good a model is: perplexity, agreement, tasks, continuations. Knows nothing of pruning."""
