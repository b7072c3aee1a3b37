"""One file per layer type. Attribute names equal the checkpoint's tensor names."""
