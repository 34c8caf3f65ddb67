"""Our own INT4 and INT8 kernels: their source (`cuda/`), how it is built, loaded and called from torch."""
