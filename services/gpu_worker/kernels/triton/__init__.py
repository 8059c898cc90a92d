"""The same operations as in the package above, as Triton kernels for GPUs; each has a torch twin there.

Nothing else in the engine imports triton, so machines without it need none. Import what you call:
a kernel that cannot serve a shape raises `UnsupportedShape` and never computes it in another way.
Numbers of rows, and tables that lie anywhere, are arguments that a kernel is not specialised for: it would be compiled
again, for a second or so, when a batch of another size first comes.
Each module lists in CONFIGURATIONS what `python -m benchmarks.compile_kernels` compiles without a GPU.
"""
