"""Read from wandb's local files which rounds they hold. They are protobuf records in LevelDB's log format."""

import json
import struct
from collections.abc import Iterator

from ray_ddpo.common.run_storage.storage import Storage

HEAD = 7  # bytes of wandb's own file header
BLOCK = 32768
RECORD_HEAD = struct.Struct("<IHB")  # checksum, length, kind
WHOLE, FIRST, MIDDLE, LAST = 1, 2, 3, 4


def rounds_in_files(folder: Storage, identity: str) -> int:
    """Return how many rounds of the run `identity` are in all its files in wandb's folder.

    Every start has its own file.
    """
    names = [f"{name}/run-{identity}.wandb" for name in folder.names() if name.endswith(f"-{identity}")]
    return max((rounds_in(folder.read(name)) for name in names if folder.exists(name)), default=0)


def rounds_in(data: bytes) -> int:
    """Return one file's last round, plus 1."""
    # The module creates its types at run time.
    from wandb.proto.wandb_internal_pb2 import Record  # pyright: ignore[reportAttributeAccessIssue]

    items = (item for record in records(data) for item in Record.FromString(record).history.item)
    found = [json.loads(item.value_json) for item in items if "round" in (item.key, *item.nested_key[:1])]
    return int(max(found, default=-1)) + 1


def records(data: bytes) -> Iterator[bytes]:
    """Yield a file's records, up to an incomplete one."""
    place, record = HEAD, b""
    while True:
        if BLOCK - place % BLOCK < RECORD_HEAD.size:  # a block ends with padding where no record head fits
            place += BLOCK - place % BLOCK
        if place + RECORD_HEAD.size > len(data):
            return
        _, length, kind = RECORD_HEAD.unpack_from(data, place)
        place += RECORD_HEAD.size
        if kind not in (WHOLE, FIRST, MIDDLE, LAST) or place + length > len(data):
            return
        part, place = data[place : place + length], place + length
        record = part if kind in (WHOLE, FIRST) else record + part
        if kind in (WHOLE, LAST):
            yield record
