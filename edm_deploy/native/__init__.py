"""Code that is compiled where it runs: the cache of compiled code, C++ for this machine's CPU, and the vectors that its kernels share."""
