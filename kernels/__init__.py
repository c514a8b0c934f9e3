"""Floor 1: pure tensor operations, a folder each, every one with a plain PyTorch reference."""
