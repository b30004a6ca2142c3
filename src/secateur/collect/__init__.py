"""What is learnt of a matrix before it is solved: sums over its inputs, gradients, and on which windows."""
