"""System: files, ranks, and the machine."""
