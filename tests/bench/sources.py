"""The loader on the same photographs wherever their bytes lie: makes the other places of a folder, then

dali-views bench FOLDER --source LIST --source SHARDS ...

python tests/bench/sources.py FOLDER --csv OUT.csv --rounds 5 --seconds 6

The bucket is served by moto on this machine, which takes more of the processors than reading from it does.
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

import lmdb
import pyarrow as pa
import pyarrow.parquet as pq

from dali_views import SampleIndex
from dali_views.tools import cli
from dali_views.tools.pack import pack_shards

sys.path.insert(0, str(Path(__file__).parents[1]))
from s3 import REGION, served

PER_SHARD = 64
KEYS = {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_REGION": REGION}


def main() -> None:
    photos, *options = sys.argv[1:]
    folder = SampleIndex.from_folder(photos)
    with tempfile.TemporaryDirectory() as made, served() as store:
        os.environ |= {**KEYS, "AWS_ENDPOINT_URL": store.meta.endpoint_url}
        places = everywhere(folder, Path(made), store)
        sources = [word for place in places for word in ("--source", *place)]
        cli.main(["bench", photos, "--device", "cpu", *sources, *options])


def everywhere(folder: SampleIndex, into: Path, store: object) -> list[list[str]]:
    """The folder's photographs in every other place; what each is called on the command line."""
    (into / "photos").symlink_to(folder.root)
    names = [Path("photos", Path(folder.path(row)).relative_to(folder.root)) for row in range(len(folder))]
    (into / "list.txt").write_text("".join(f"{name}\n" for name in names))
    pack_shards(folder, into / "shards", per_shard=PER_SHARD, progress=False)
    shards = sorted((into / "shards").glob("*.tar"))
    table = pa.table({"image": [folder.encoded(row) for row in range(len(folder))]})
    with pa.OSFile(str(into / "images.arrow"), "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
        writer.write_table(table, max_chunksize=100)
    pq.write_table(table, into / "snappy-of-100.parquet", row_group_size=100)
    with (
        lmdb.open(str(into / "images.lmdb"), map_size=1 << 32) as environment,
        environment.begin(write=True) as put,
    ):
        for row, name in enumerate(names):
            put.put(name.name.encode(), folder.encoded(row))
    store.create_bucket(Bucket="photos")  # type: ignore[attr-defined]
    for row, name in enumerate(names):
        content = folder.encoded(row)
        store.put_object(Bucket="photos", Key=f"bucket/{name.name}", Body=content)  # type: ignore[attr-defined]
    return [
        [str(into / "list.txt")],
        list(map(str, shards)),
        [str(into / "images.arrow")],
        [str(into / "snappy-of-100.parquet")],
        [str(into / "images.lmdb")],
        ["s3://photos/bucket"],
    ]


if __name__ == "__main__":
    main()
