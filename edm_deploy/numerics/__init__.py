"""Integer codes, activation tables, and how codes are packed in memory."""
