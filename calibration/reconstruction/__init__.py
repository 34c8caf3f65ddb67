"""Block reconstruction: blocks, their cached inputs and targets, and the training of one block after another."""
