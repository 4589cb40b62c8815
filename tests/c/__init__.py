"""The kernels from C: fastclip/include/fastclip.h."""
