"""The kernels in C++, and their compilation on this machine."""
