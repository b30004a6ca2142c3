"""The shape of a model: stacks, blocks, matrices; the model without weights."""
