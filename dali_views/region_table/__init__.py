"""The parts of a `regions.RegionTable`: its rows in memory, their checks, how they travel between ranks."""
