"""Imported as `qwen35_mlx.convert`: writes model folders of our own from Hugging Face ones.

There is no converter in this release. Folders in the layouts of Hugging Face and of
mlx-community are read as they are, so nothing has to be converted to run a model.
"""
