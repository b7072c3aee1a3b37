"""One file per operation: the public op and its `reference` in MLX operations.

Imported by the layers; nothing here knows a layer or a checkpoint.
"""
