"""Hidden states on their way through the blocks, forwards and backwards, and what is seen on the way."""
