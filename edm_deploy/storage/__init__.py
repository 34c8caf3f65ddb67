"""Files and directories: written whole or not at all, tensors streamed, weights mapped."""
