"""From the tensors of a checkpoint to the parameters of a module, and back."""
