"""Block-wise reconstruction: AdaRound and learned scales, one block at a time."""
