"""The library: scoring, sparsity, surgery, training, evaluation, storage and tracking. Never imports kfp.

Letters of tensor shapes, the same in every docstring: B batch, T tokens, D hidden size, F MLP width, H query
heads, K KV heads, A head dimension, V vocabulary, L decoder layers, S sequences.
"""
