"""A compact trainer for self-supervised learning that steers its own data loader.

Methods (a loss with its networks) and guides (who writes the region table) combine freely.
"""
