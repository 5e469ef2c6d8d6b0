"""`dali-views doctor`: what this machine can do, and what to change, before a run finds out."""
