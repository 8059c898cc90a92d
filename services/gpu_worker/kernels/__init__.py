"""Tensor operations of the engine, forward and backward, as plain functions over torch tensors.

Shape letters: N tokens of the flat stream, D hidden size, H query heads, G key/value heads, E head size,
F feed-forward width, R low-rank width, S keys of one sequence, B sequences, T keys of the longest of them.
Nothing here knows a request, a job or a layer; autograd is off everywhere.
"""
