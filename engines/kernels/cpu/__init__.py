"""The kernels in C++ for CPUs: INT8 products by AVX512-VNNI, AVX-VNNI or AVX2, compiled for this machine when an engine is first opened."""
