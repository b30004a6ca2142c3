"""Recovery: training after pruning, with zeros that stay zero."""
