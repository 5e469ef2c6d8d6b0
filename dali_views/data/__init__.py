"""Data: which images there are, where their bytes lie, and what is known of them.

index     `SampleIndex`, with one constructor per kind of data set
scan      what a scan finds (`Scan`, which an index extends), and the file that keeps it
listing   folders and text lists        shards  tar shards        tables      Parquet and Arrow
truth     COCO sets and true boxes      remote  object stores     lmdb_store  LMDB
headers   sizes of images from their first bytes; which files the decoder cannot take
source    the protocol of what is read by Python, ranges of files, reading ahead
cache     images of a slow source kept on a local disk
bad_list  the text file of unusable images

A new kind of container has a scan and a `Source`, as `lmdb_store` has.
"""
