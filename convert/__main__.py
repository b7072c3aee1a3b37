"""`python -m qwen35_mlx.convert`, which is `qwen35-mlx convert`."""

from .command import main

if __name__ == "__main__":
    main()
