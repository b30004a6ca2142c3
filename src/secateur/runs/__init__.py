"""What every long run has: an output whose name it owns."""
