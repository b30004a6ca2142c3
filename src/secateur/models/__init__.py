"""What a model is: its files, its blocks, its matrices, and hidden states on their way through. No pruning here."""
