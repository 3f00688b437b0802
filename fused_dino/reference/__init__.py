"""The specification: the shortest eager PyTorch that is right. Every faster implementation is tested against it."""
