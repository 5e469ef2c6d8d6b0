"""Commands that lie apart from their work, which imports PyTorch."""
