"""Logs of TensorBoard and Weights & Biases, read without either: framing and fields.

Both are files of records, each a protocol buffer; a run that was killed leaves a torn
last one. Checksums are not verified: what is torn does not parse, or is left out.
"""

import json
import struct
from collections.abc import Iterator

# What a field holds: an int of a varint, else bytes.
Fields = dict[int, list[int | bytes]]

_BLOCK = 32768  # bytes, over which no chunk of Weights & Biases runs


def tensorboard_scalars(data: bytes) -> Iterator[tuple[str, int, float]]:
    """Tag, step and value of each scalar of an event file, in order."""
    at = 0
    while at + 12 <= len(data):
        (length,) = struct.unpack_from("<Q", data, at)
        record = data[at + 12 : at + 12 + length]
        if len(record) < length:
            return
        at += 16 + length
        event = _fields(record)  # step 2, summary 5
        step = _step(event)
        for summary in _messages(event, 5):
            for value in _messages(_fields(summary), 1):
                fields = _fields(value)  # tag 1, simple_value 2, tensor 8
                number = _scalar(fields)
                if number is not None:
                    yield _text(fields, 1), step, number


def wandb_rows(data: bytes) -> Iterator[dict[str, object]]:
    """Each row that was logged: values of JSON by key, nested keys with dots."""
    for record in _wandb_records(data):
        for history in _messages(_fields(record), 2):
            row = {}
            for item in _messages(_fields(history), 1):
                fields = _fields(item)  # key 1, nested_key 2, value_json 16
                parts = [x.decode(errors="replace") for x in _messages(fields, 2)]
                try:
                    value = json.loads(_text(fields, 16))
                except ValueError:
                    continue
                row[".".join(parts) or _text(fields, 1)] = value
            yield row


def _wandb_records(data: bytes) -> Iterator[bytes]:
    """Chunks, of LevelDB's log format behind seven bytes, put together."""
    at, whole = 7, b""
    while at + 7 <= len(data):
        if _BLOCK - at % _BLOCK < 7:  # too little for a chunk
            at += _BLOCK - at % _BLOCK
            continue
        length, kind = struct.unpack_from("<HB", data, at + 4)
        chunk = data[at + 7 : at + 7 + length]
        if len(chunk) < length or kind not in (1, 2, 3, 4):
            return
        at += 7 + length
        whole = chunk if kind in (1, 2) else whole + chunk
        if kind in (1, 4):
            yield whole


def _fields(message: bytes) -> Fields:
    """What a message holds by the number of the field; up to where it is torn."""
    found: Fields = {}
    at = 0
    while at < len(message):
        key, at = _varint(message, at)
        kind = key & 7
        value: int | bytes
        if kind == 0:
            value, at = _varint(message, at)
        elif kind in (1, 2, 5):
            size, at = _varint(message, at) if kind == 2 else ({1: 8, 5: 4}[kind], at)
            value, at = message[at : at + size], at + size
        else:
            break
        if at > len(message):
            break
        found.setdefault(key >> 3, []).append(value)
    return found


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """The number, and where it ends: behind the data where that is torn."""
    number = shift = 0
    while at < len(data):
        number |= (data[at] & 127) << shift
        at, shift = at + 1, shift + 7
        if data[at - 1] < 128:
            return number, at
    return number, len(data) + 1


def _messages(fields: Fields, number: int) -> list[bytes]:
    return [x for x in fields.get(number, []) if isinstance(x, bytes)]


def _text(fields: Fields, number: int) -> str:
    return b"".join(_messages(fields, number)[-1:]).decode(errors="replace")


def _step(event: Fields) -> int:
    steps = [x for x in event.get(2, []) if isinstance(x, int)]
    return steps[-1] if steps else 0


def _scalar(value: Fields) -> float | None:
    """Of a `simple_value`, or of a tensor of one float."""
    for raw in _messages(value, 2):
        if len(raw) == 4:
            return struct.unpack("<f", raw)[0]
    for tensor in _messages(value, 8):
        fields = _fields(tensor)  # dtype 1, tensor_content 4, float_val 5
        for raw in (*_messages(fields, 5), *_messages(fields, 4)):
            if len(raw) in (4, 8) and fields.get(1) in ([1], [2]):
                return struct.unpack("<f" if len(raw) == 4 else "<d", raw)[0]
    return None
