"""Kernels for the CPU, compiled by numba at the first call. Importing its modules needs numba."""
