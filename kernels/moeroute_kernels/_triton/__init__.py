"""The ops' kernels for CUDA devices, in Triton; nothing here is imported before the first call.

Also read by Triton's interpreter, which runs them on CPU tensors where `TRITON_INTERPRET=1`.
"""
