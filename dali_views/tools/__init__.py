"""Tools: the commands of `dali-views`."""
