"""What a `.wandb` file holds, read without wandb's own reader, which is not part of its public face."""

from __future__ import annotations

import json
import struct
from collections import defaultdict
from pathlib import Path
from typing import Any

BLOCK_BYTES = 32 * 1024


def read_offline_file(path: Path) -> dict[str, list[Any]]:
    """Records of a `.wandb` file by kind: a LevelDB log (blocks of 32 KiB, headers of 7 bytes) of protobufs."""
    from wandb.proto import wandb_internal_pb2

    data, position, record = path.read_bytes(), 7, b""
    found: dict[str, list[Any]] = defaultdict(list)
    while position < len(data):
        left = BLOCK_BYTES - position % BLOCK_BYTES
        if left < 7:
            position += left
            continue
        _, length, part = struct.unpack("<IHB", data[position : position + 7])
        record += data[position + 7 : position + 7 + length]
        position += 7 + length
        if part in (1, 4):  # whole, or the last of several parts
            message = wandb_internal_pb2.Record()
            message.ParseFromString(record)
            kind = message.WhichOneof("record_type")
            found[kind].append(getattr(message, kind))
            record = b""
    return found


def mirrors(folder: Path) -> dict[str, Path]:
    """The `.wandb` file of each mirror in `folder`/wandb by the id of its run; an id that is there twice fails."""
    found: dict[str, Path] = {}
    for file in sorted((folder / "wandb").glob("offline-run-*/*.wandb")):
        name = file.stem.removeprefix("run-")
        assert name not in found, f"{name} is mirrored twice"
        found[name] = file
    return found


def config_of(records: dict[str, list[Any]]) -> dict[str, Any]:
    (run,) = records["run"]
    return {update.key: json.loads(update.value_json) for update in run.config.update}


def summary_of(records: dict[str, list[Any]]) -> dict[str, Any]:
    return {update.key: json.loads(update.value_json) for record in records["summary"] for update in record.update}


def series_of(records: dict[str, list[Any]]) -> list[dict[str, Any]]:
    rows = []
    for record in records["history"]:
        rows.append({item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.item})
    return rows
