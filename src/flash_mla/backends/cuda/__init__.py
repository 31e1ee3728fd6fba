"""Compiled Hopper (sm_90a) kernels, launched through the NVIDIA driver."""
