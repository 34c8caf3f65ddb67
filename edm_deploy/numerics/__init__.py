"""Integer codes, activation tables, and the memory layout of packed codes."""
