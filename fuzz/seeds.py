#!/usr/bin/env python3
"""Writes the first inputs of every target into fuzz/corpus, made of the fixtures: python3 fuzz/seeds.py, from anywhere.

What fuzzing has kept there since is better; this is for a corpus that begins anew, or for a target that gets other bytes.
"""
import json
import pathlib
import re
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

BLOCKS = {0: (1, 4), 1: (1, 2), 30: (1, 2), 8: (32, 34), 2: (32, 18), 3: (32, 20), 6: (32, 22), 7: (32, 24), 20: (32, 18), 12: (256, 144), 13: (256, 176), 14: (256, 210)}


def text(value):
    return struct.pack("<Q", len(value.encode())) + value.encode()


def typed(value):
    """A value of GGUF's metadata, its type in front; an array's type and length too."""
    if isinstance(value, list):
        kind = typed(value[0])[:4] if value else struct.pack("<I", 4)
        return struct.pack("<I", 9) + kind + struct.pack("<Q", len(value)) + b"".join(typed(v)[4:] for v in value)
    if isinstance(value, str):
        return struct.pack("<I", 8) + text(value)
    kind, form = {bool: (7, "?"), int: (5 if isinstance(value, int) and value < 0 else 4, "i"), float: (6, "f")}[type(value)]
    return struct.pack("<I" + form, kind, value)


def gguf(keys, tensors):
    """A file of the keys (as they are written) and of tensors (name, dimensions with the rows' length first, type), behind each other."""
    infos, data = b"", b""
    for name, dims, kind in tensors:
        block, size = BLOCKS[kind]
        infos += text(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, len(data))
        count = 1
        for dim in dims:
            count *= dim
        data += bytes(i % 61 for i in range(count // block * size))
        data += bytes(-len(data) % 32)
    header = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(keys)) + b"".join(text(key) + value for key, value in keys) + infos
    return header + bytes(-len(header) % 32) + data


def parsed(raw):
    """Keys and tensors of a file, as `gguf` takes them."""
    at = 8

    def read(form):
        nonlocal at
        found = struct.unpack_from("<" + form, raw, at)
        at += struct.calcsize("<" + form)
        return found[0] if len(found) == 1 else found

    def skip(kind):
        nonlocal at
        size = read("Q") if kind == 8 else (1, 1, 2, 2, 4, 4, 4, 1, 0, 0, 8, 8, 8)[kind]
        at += size

    def name():
        nonlocal at
        size = read("Q")
        at += size
        return raw[at - size : at].decode()

    n, keys, tensors = read("QQ"), [], []
    for _ in range(n[1]):
        key, start, kind = name(), at, read("I")
        if kind == 9:
            kind, count = read("IQ")
            for _ in range(count):
                skip(kind)
        else:
            skip(kind)
        keys.append((key, raw[start:at]))
    for _ in range(n[0]):
        tensor = name()
        dims = [read("Q") for _ in range(read("I"))]
        tensors.append((tensor, dims, read("I")))
        read("Q")
    return keys, tensors


for path in sorted((FIXTURES / "gguf").glob("*.gguf")):
    keys, tensors = parsed(path.read_bytes())
    matrices = [t for t in tensors if len(t[1]) == 2]
    cut = [(name, [BLOCKS[kind][0], 2], kind) for name, _, kind in {kind: (name, dims, kind) for name, dims, kind in matrices}.values()]
    keep("gguf", f"{path.stem}-cut", path.read_bytes()[:300])
    keep("gguf", f"{path.stem}-0", gguf(keys, []))
    keep("gguf", f"{path.stem}", gguf([kv for kv in keys if not kv[0].startswith("tokenizer")], cut))


def tiny(vocabulary, hidden=4, kind=0, rows=0, **more):
    """A whole model of one layer, as small as it can be."""
    n = len(vocabulary.get("tokens", "abc"))
    keys = {"general.architecture": "llama", "llama.block_count": 1, "llama.context_length": 8, "llama.embedding_length": hidden,
            "llama.feed_forward_length": hidden, "llama.attention.head_count": 2, "llama.attention.head_count_kv": 1,
            "llama.attention.layer_norm_rms_epsilon": 1e-5, "llama.rope.dimension_count": hidden // 2}
    keys |= {f"tokenizer.ggml.{key}": value for key, value in vocabulary.items() if key != "template"}
    keys |= {"tokenizer.chat_template": vocabulary["template"]} if "template" in vocabulary else {}
    keys |= {key.replace("__", "."): value for key, value in more.items()}
    names = [("token_embd", [hidden, n]), ("output_norm", [hidden]), ("output", [hidden, n])]
    names += [(f"blk.0.{name}", [hidden, rows]) for name, rows in
              [("attn_q", hidden), ("attn_k", hidden // 2), ("attn_v", hidden // 2), ("attn_output", hidden), ("ffn_gate", hidden), ("ffn_up", hidden), ("ffn_down", hidden)]]
    names += [("blk.0.attn_norm", [hidden]), ("blk.0.ffn_norm", [hidden])]
    if rows:
        names.append(("rope_freqs", [rows]))
    tensors = [(name + ".weight", dims, kind if len(dims) == 2 else 0) for name, dims in names]
    return gguf([(key, typed(value)) for key, value in keys.items()], tensors)


PIECES = {"model": "llama", "pre": "default", "tokens": ["<unk>", "<s>", "</s>", "\u2581", "a", "b", "\u2581a", "<0x0A>"], "scores": [-float(i) for i in range(8)],
          "token_type": [2, 3, 3, 1, 1, 4, 1, 6], "bos_token_id": 1, "eos_token_id": 2, "unknown_token_id": 0, "add_bos_token": True, "add_eos_token": False,
          "add_space_prefix": True, "template": "{% for m in messages %}{{ m.role }}{{ m.content }}{{ eos_token }}{% endfor %}"}
BYTES = {"model": "gpt2", "tokens": ["<s>", "</s>", "a", "b", "\u0120", "ab", "\u0120a"], "token_type": [3, 3, 1, 1, 1, 1, 1], "merges": ["a b", "\u0120 a"],
         "bos_token_id": 0, "eos_token_id": 1}
keep("gguf", "tiny", tiny({}))
keep("gguf", "tiny-pieces", tiny(PIECES))
keep("gguf", "tiny-spaces", tiny(PIECES | {"remove_extra_whitespaces": True, "add_space_prefix": False}))
for pre in ("default", "gpt-2", "smollm", "llama-bpe", "tekken", "qwen2"):
    keep("gguf", f"tiny-{pre}", tiny(BYTES | {"pre": pre}))
for kind in (1, 30):
    keep("gguf", f"tiny-{kind}", tiny({}, kind=kind))
keep("gguf", "tiny-q8_0", tiny({}, hidden=32, kind=8))
keep("gguf", "tiny-factors", tiny({}, rows=1))
keep("gguf", "tiny-long-heads", tiny({}, rows=1, llama__attention__key_length=2**31 - 2, llama__attention__value_length=2**31 - 2,
     llama__rope__dimension_count=2**31 - 2))
keep("gguf", "tiny-linear", tiny({}, llama__rope__scaling__factor=2.0, llama__rope__scaling__type="linear", llama__attention__sliding_window=4))
keep("gguf", "tiny-part", tiny({}, split__count=2, split__no=0, split__tensors__count=12))

for path in sorted((FUZZ.parent / "tests/data/chat").glob("*.jinja")):
    keep("chat_template", f"{path.stem}", path.read_bytes())
    keep("chat_template", f"{path.stem}-said", path.read_bytes() + b"\0What is it?")
# What the tests of templates give: every source in quotes that has a tag.
tests = (FUZZ.parent / "src/chat/tests.rs").read_text()
for i, found in enumerate(re.findall(r'"((?:[^"\\]|\\.)*\{[{%#](?:[^"\\]|\\.)*)"', tests)):
    source = found.replace("{{%", "{%").replace("%}}", "%}").replace("\\n", "\n").replace('\\"', '"')
    keep("chat_template", f"test-{i:03}", source.encode() + b"\0Hi")
