"""The Hub's content store for Xet, the protocol that huggingface_hub prefers to Git LFS for large files.

What a client (hf_xet, in Rust) does, as seen with version 1.8:

- It cuts files into chunks of about 64 kB by their content, packs chunks that the store lacks into *xorbs*, and sends
  each with `POST /cas/v1/xorbs/default/<hash>`.
- It describes how files are put together from chunks in *shards*: `POST /cas/v1/shards`. Only then is a file there.
- To read, it asks `GET /cas/v1/reconstructions/<file hash>`, with `Range: bytes=…` for a part, and is told which chunks
  of which xorbs to fetch (by ranges, from addresses that need no token) and how many bytes to leave out at the start.
- It asks newer versions of these routes (`/cas/v2/…`) and for known chunks (`/cas/v1/chunks/…`) first, and takes a 404
  as "not here".

A hash in an address is four little-endian 64-bit words, each as 16 hex digits. The layouts below have all numbers in
little-endian order. The hashes are keyed BLAKE3 ones, and are taken as given: what is checked is the SHA-256 of every
rebuilt file.
"""

import functools
import hashlib
import json
import os
import struct
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

SHARD_HEADER = 48  # bytes before the first file of a shard; everything in a shard comes in entries of 48
ENTRY = 48
END_OF_FILES = b"\xff" * 32
HAS_VERIFICATION = 1 << 31  # one more entry for every term
HAS_SHA256 = 1 << 30  # one more entry with the SHA-256 of the file
CHUNK_HEADER = 8
XORB_FOOTER = b"XETBLOB"
STORED, LZ4, GROUPED_LZ4 = 0, 1, 2  # how a chunk is compressed


@dataclass(frozen=True)
class Chunk:
    """A chunk's place in its xorb, with its header."""

    start: int  # byte offset of the header
    end: int  # byte offset behind the data
    scheme: int
    unpacked: int  # bytes of the file that it holds


@dataclass(frozen=True)
class Term:
    """A piece of a file: the chunks first..end-1 of a xorb."""

    xorb: str
    first: int
    end: int


@dataclass(frozen=True)
class FileEntry:
    """A file as a shard describes it."""

    hash: str
    sha256: str | None
    terms: list[Term]


def spell_hash(raw: bytes) -> str:
    """The 32 bytes of a hash as they are written in addresses."""
    return "".join(f"{word:016x}" for word in struct.unpack("<4Q", raw))


def read_shard(data: bytes) -> Iterator[FileEntry]:
    """The files that a shard describes.

    A file is an entry (hash 32, flags 4, number of terms 4, unused 8), one entry a term (xorb hash 32, flags 4,
    unpacked bytes 4, first chunk 4, end chunk 4), and optional entries that the flags announce.
    """
    position = SHARD_HEADER
    while data[position : position + 32] != END_OF_FILES:
        file_hash = spell_hash(data[position : position + 32])
        flags, count = struct.unpack_from("<II", data, position + 32)
        position += ENTRY
        terms = []
        for _ in range(count):
            first, end = struct.unpack_from("<II", data, position + 40)
            terms.append(Term(spell_hash(data[position : position + 32]), first, end))
            position += ENTRY
        if flags & HAS_VERIFICATION:
            position += ENTRY * count
        sha256 = None
        if flags & HAS_SHA256:
            sha256 = spell_hash(data[position : position + 32])
            position += ENTRY
        yield FileEntry(file_hash, sha256, terms)


@functools.lru_cache(1024)
def read_chunks(xorb: Path) -> list[Chunk]:
    """The chunks of a xorb, from their headers (version 1, packed bytes 3, scheme 1, unpacked bytes 3)."""
    chunks = []
    position = 0
    with open(xorb, "rb") as file:
        while len(header := file.read(CHUNK_HEADER)) == CHUNK_HEADER and header[:7] != XORB_FOOTER:
            end = position + CHUNK_HEADER + int.from_bytes(header[1:4], "little")
            chunks.append(Chunk(position, end, header[4], int.from_bytes(header[5:8], "little")))
            position = file.seek(end)
    return chunks


def unpack(packed: bytes, chunk: Chunk) -> bytes:
    """The content of a chunk, without its header."""
    if chunk.scheme == STORED:
        return packed
    data = pa.decompress(packed, chunk.unpacked, codec="lz4", asbytes=True)
    if chunk.scheme == LZ4:
        return data
    assert chunk.scheme == GROUPED_LZ4, f"unknown compression scheme {chunk.scheme}"
    # Every fourth byte comes first, then those behind them, and so on: good for float32.
    grouped = np.frombuffer(data, np.uint8)
    bytes_in_order = np.empty_like(grouped)
    start = 0
    for phase in range(4):
        part = bytes_in_order[phase::4]
        part[:] = grouped[start : start + len(part)]
        start += len(part)
    return bytes_in_order.tobytes()


def write_whole(path: Path, content: bytes) -> None:
    """Write a file that appears under its name only when it is whole, whoever else writes it too."""
    partial = path.with_name(f"{path.name}.{threading.get_ident()}.partial")
    partial.write_bytes(content)
    os.replace(partial, path)


class XetStore:
    """Xorbs, and the recipes of the files that are made of them, in a directory."""

    def __init__(self, root: Path):
        self.xorbs = root / "xorbs"
        self.recipes = root / "xet"  # <file hash>: its size and terms; <sha256>.sha: its file hash
        for directory in (self.xorbs, self.recipes):
            directory.mkdir(parents=True, exist_ok=True)

    def put_xorb(self, xorb: str, content: bytes) -> bool:
        """Keep a xorb; whether it is a new one."""
        path = self.xorbs / xorb
        if path.exists():
            return False
        write_whole(path, content)
        return True

    def rebuild(self, terms: list[Term]) -> bytes:
        """The content of the file that these terms make."""
        content = bytearray()
        for term in terms:
            path = self.xorbs / term.xorb
            chunks = read_chunks(path)[term.first : term.end]
            with open(path, "rb") as file:
                for chunk in chunks:
                    file.seek(chunk.start + CHUNK_HEADER)
                    content += unpack(file.read(chunk.end - file.tell()), chunk)
        return bytes(content)

    def add_file(self, entry: FileEntry) -> bytes:
        """Make a file readable and return its content; ValueError when it is not what the shard says."""
        content = self.rebuild(entry.terms)
        sha256 = hashlib.sha256(content).hexdigest()
        if entry.sha256 not in (None, sha256):
            raise ValueError(f"the shard says SHA-256 {entry.sha256}, the content has {sha256}")
        recipe = {"size": len(content), "terms": [[term.xorb, term.first, term.end] for term in entry.terms]}
        write_whole(self.recipes / entry.hash, json.dumps(recipe).encode())
        write_whole(self.recipes / f"{sha256}.sha", entry.hash.encode())
        return content

    def hash_of(self, sha256: str) -> str | None:
        """The Xet hash of a file, or None where it did not come through Xet."""
        path = self.recipes / f"{sha256}.sha"
        return path.read_text() if path.exists() else None

    def size(self, file_hash: str) -> int | None:
        """Bytes of a file, or None where it is unknown."""
        path = self.recipes / file_hash
        return json.loads(path.read_text())["size"] if path.exists() else None

    def reconstruction(self, file_hash: str, start: int, end: int, xorb_url: str) -> dict:
        """What to fetch, and from below which address, to have the bytes start..end-1 of a file."""
        recipe = json.loads((self.recipes / file_hash).read_text())
        answer = {"offset_into_first_range": 0, "terms": [], "fetch_info": {}}
        position = 0  # in the file
        for term in (Term(*fields) for fields in recipe["terms"]):
            chunks = read_chunks(self.xorbs / term.xorb)
            wanted = []
            for index in range(term.first, term.end):
                if position < end and position + chunks[index].unpacked > start:
                    if not answer["terms"] and not wanted:
                        answer["offset_into_first_range"] = start - position
                    wanted.append(index)
                position += chunks[index].unpacked
            if not wanted:
                continue
            first, last = wanted[0], wanted[-1]
            span = {"start": first, "end": last + 1}
            unpacked = sum(chunk.unpacked for chunk in chunks[first : last + 1])
            answer["terms"].append({"hash": term.xorb, "unpacked_length": unpacked, "range": span})
            answer["fetch_info"].setdefault(term.xorb, []).append(
                {
                    "range": span,
                    "url": f"{xorb_url}/{term.xorb}",
                    "url_range": {"start": chunks[first].start, "end": chunks[last].end - 1},  # last byte included
                }
            )
        return answer
