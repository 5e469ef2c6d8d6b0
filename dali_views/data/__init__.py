"""Data: which images there are, where their bytes lie, and what is known of them."""
