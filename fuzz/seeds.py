#!/usr/bin/env python3
"""Writes the first inputs of every target into fuzz/corpus, made of the fixtures: python3 fuzz/seeds.py, from anywhere.

What fuzzing has kept there since is better; this is for a corpus that begins anew, or for a target that gets other bytes.
"""
import json
import pathlib
import struct

FUZZ = pathlib.Path(__file__).resolve().parent
FIXTURES = FUZZ.parent / "tests/fixtures"
SIZES = {"F32": 4, "BF16": 2, "F16": 2, "I64": 8}


def keep(target, name, data):
    path = FUZZ / "corpus" / target / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


def small(header, n):
    """The first n tensors of a header, no dimension longer than 4, one behind the other; and the bytes of their data."""
    out, end = {}, 0
    for name, info in [(k, v) for k, v in header.items() if k != "__metadata__"][:n]:
        shape = [min(dim, 4) for dim in info["shape"]]
        size = SIZES[info["dtype"]]
        for dim in shape:
            size *= dim
        out[name] = {"dtype": info["dtype"], "shape": shape, "data_offsets": [end, end + size]}
        end += size
    return {"__metadata__": {"format": "pt"}} | out, end


def padded(header):
    text = json.dumps(header, separators=(",", ":")).encode()
    return text + b" " * (-len(text) % 8)


for path in sorted(FIXTURES.glob("*/*.safetensors")):
    raw = path.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    name = f"{path.parent.name}-{path.stem}"
    keep("safetensors", f"{name}-cut", b"\0" + raw[: 8 + min(length, 400)])
    for n in (0, 1, 3, 8):
        header, end = small(json.loads(raw[8 : 8 + length]), n)
        text, data = padded(header), bytes(i % 251 for i in range(end))
        if n == 1:
            keep("safetensors", f"{name}-whole", b"\0" + struct.pack("<Q", len(text)) + text + data)
            keep("safetensors", f"{name}-split", b"\1" + text + b"\0" + data)
        keep("safetensors", f"{name}-{n}", b"\2" + struct.pack("<H", end) + text)

for path in sorted(FIXTURES.glob("*/config*.json")):
    own = (path.parent / "generation_config.json").read_bytes()
    index = path.parent / "model.safetensors.index.json"
    parts = [path.read_bytes(), own]
    keep("config", f"{path.parent.name}-{path.stem}-alone", parts[0])
    if index.exists():
        whole = json.loads(index.read_bytes())
        whole["weight_map"] = dict(list(whole["weight_map"].items())[:4])
        parts.append(json.dumps(whole).encode())
    keep("config", f"{path.parent.name}-{path.stem}", b"\0".join(parts))

for size in (576, 320, 64):
    about = {"of": "layout", "xxh3": "$HASH"}
    text = json.dumps({"w": {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}, "__metadata__": about}, separators=(",", ":"))
    # The hash has 16 characters and stands for 5; data begins at a multiple of 64 behind the length of 8.
    pad = -(len(text) + 11 + 8) % 64
    keep("kept_weights", f"one-{size}", text.encode() + b" " * pad + b"\0" + bytes(i % 251 for i in range(size)))
keep("kept_weights", "none", b'{"__metadata__":{"of":"layout","xxh3":"$HASH"}}')
keep("kept_weights", "not-metadata", b'{"__metadata__":{"of":7}}')
