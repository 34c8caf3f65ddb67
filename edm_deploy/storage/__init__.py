"""Files and directories: written atomically, tensors streamed, weights memory-mapped, json decoded strictly."""
