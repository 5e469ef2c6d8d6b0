"""Plan: which sample comes when, and which rectangle, flip and colour each view gets; NumPy only."""
