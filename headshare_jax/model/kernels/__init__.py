"""Kernels of Pallas and cuDNN; each is imported only where it runs."""
