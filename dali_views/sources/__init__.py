"""Where images come from: files, shards, tables, object stores, Python objects; scanned once, read by row."""
