"""Image files that real cameras and tools write, and that decoders read differently."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
from PIL import Image

ORIENTATION, MAKE, EXPOSURE_BIAS = 0x0112, 0x010F, 0x9204
BYTE, ASCII, SHORT, LONG, RATIONAL, SIGNED_BYTE, SIGNED_SHORT, SIGNED_LONG, SIGNED_RATIONAL = 1, 2, 3, 4, 5, 6, 8, 9, 10
Entry = tuple[int, int, int, bytes]  # tag, type, count, value or offset in 4 bytes


def picture() -> Image.Image:
    """64 x 48 pixels, smooth, and different however it is turned."""
    y, x = np.mgrid[0:48, 0:64]
    return Image.fromarray(np.stack([x * 4, y * 5, x * 2 + y * 2], -1).clip(0, 255).astype(np.uint8))


def encoded(kind: str, image: Image.Image | None = None, **options: object) -> bytes:
    buffer = io.BytesIO()
    (image or picture()).save(buffer, kind, **({"quality": 95} if kind == "JPEG" else {}), **options)
    return buffer.getvalue()


def exif(*entries: Entry, order: str = "<", count: int | None = None) -> bytes:
    """A TIFF header with one directory; `count` overrides the number of entries it claims."""
    mark = b"II" if order == "<" else b"MM"
    body = struct.pack(f"{order}H", len(entries) if count is None else count)
    body += b"".join(struct.pack(f"{order}HHI", tag, kind, n) + value for tag, kind, n, value in entries)
    return mark + struct.pack(f"{order}HI", 42, 8) + body + struct.pack(f"{order}I", 0)


def turned(value: int = 6, kind: int = SHORT, order: str = "<") -> Entry:
    formats = {BYTE: "Bxxx", SHORT: "HH", LONG: "I", SIGNED_BYTE: "bxxx", SIGNED_SHORT: "hh", SIGNED_LONG: "i"}
    values = (value, 0) if kind in (SHORT, SIGNED_SHORT) else (value,)
    return ORIENTATION, kind, 1, struct.pack(order + formats[kind], *values)


def segment(content: bytes) -> bytes:
    return b"\xff\xe1" + struct.pack(">H", len(content) + 2) + content


def jpeg(*segments: bytes) -> bytes:
    content = encoded("JPEG")
    start = 4 + struct.unpack(">H", content[4:6])[0]  # behind APP0
    return content[:start] + b"".join(segments) + content[start:]


def with_exif(*entries: Entry, **options: object) -> bytes:
    return jpeg(segment(b"Exif\0\0" + exif(*entries, **options)))  # type: ignore[arg-type]


def xmp(value: int = 6) -> bytes:
    return (
        b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">'
        b'<rdf:Description xmlns:tiff="http://ns.adobe.com/tiff/1.0/" tiff:Orientation="%d"/></rdf:RDF></x:xmpmeta>'
        % value
    )


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(*before: bytes, after: bytes = b"") -> bytes:
    """A PNG with chunks before its pixels, and after them."""
    content = encoded("PNG")
    return content[:33] + b"".join(before) + content[33:-12] + after + content[-12:]


def raw_profile(content: bytes) -> bytes:
    text = b"\nexif\n%8d\n" % len(content) + content.hex().encode() + b"\n"
    return chunk(b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(text))


def cmyk_without_adobe() -> bytes:
    content = encoded("JPEG", picture().convert("CMYK"))
    start = content.find(b"\xff\xee")
    return content[:start] + content[start + 2 + struct.unpack(">H", content[start + 2 : start + 4])[0] :]


def flipped(content: bytes, at: int) -> bytes:
    return content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :]


def behind(content: bytes, mark: bytes, extra: bytes) -> bytes:
    at = content.index(mark)
    return content[:at] + extra + content[at:]


_RATIONAL_MAKE = (MAKE, RATIONAL, 1, struct.pack("<I", 8))
_NEGATIVE = (EXPOSURE_BIAS, RATIONAL, 1, struct.pack("<I", 8))
_NO_SPACE = (MAKE, ASCII, 2**31, struct.pack("<I", 2**30))

# name -> content, and whether the orientation turns it by a quarter.
TURNED: dict[str, tuple[bytes, bool]] = {
    "plain.jpg": (jpeg(), False),
    "exif.jpg": (with_exif(turned()), True),
    "big-endian.jpg": (with_exif(turned(order=">"), order=">"), True),
    "long.jpg": (with_exif(turned(kind=LONG)), True),
    "signed-short.jpg": (with_exif(turned(kind=SIGNED_SHORT)), True),
    "signed-long-big-endian.jpg": (with_exif(turned(kind=SIGNED_LONG, order=">"), order=">"), True),
    "out-of-range.jpg": (with_exif(turned(9)), False),
    "zero.jpg": (with_exif(turned(0)), False),
    "xmp-alone.jpg": (jpeg(segment(b"http://ns.adobe.com/xap/1.0/\0" + xmp())), True),
    "doubled-header.jpg": (jpeg(segment(b"Exif\0\0Exif\0\0" + exif(turned()))), True),
    "exif-1-then-6.jpg": (jpeg(*(segment(b"Exif\0\0" + exif(turned(value))) for value in (1, 6))), False),
    "exif-6-then-1.jpg": (jpeg(*(segment(b"Exif\0\0" + exif(turned(value))) for value in (6, 1))), True),
    "make-is-rational.jpg": (with_exif(_RATIONAL_MAKE, turned()), True),
    "bias-is-unsigned.jpg": (with_exif(turned(), _NEGATIVE), True),
    "raw-profile.png": (png(raw_profile(b"Exif\0\0" + exif(turned()))), True),
    "exif-chunk.png": (png(chunk(b"eXIf", exif(turned()))), True),
    "exif-chunk-behind-pixels.png": (png(after=chunk(b"eXIf", exif(turned()))), True),
    "xmp-alone.png": (png(chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + xmp())), True),
    "exif.webp": (encoded("WEBP", lossless=True, exif=exif(turned())), True),
}
# Nobody can say how these are turned; all readers must agree.
UNCLEAR: dict[str, bytes] = {
    "byte.jpg": with_exif(turned(kind=BYTE)),
    "signed-byte.jpg": with_exif(turned(kind=SIGNED_BYTE)),
    "two-values.jpg": with_exif((ORIENTATION, SHORT, 2, struct.pack("<HH", 6, 1))),
    "rational.jpg": with_exif((ORIENTATION, RATIONAL, 1, struct.pack("<I", 8))),
    "ascii.jpg": with_exif((ORIENTATION, ASCII, 2, b"6\0\0\0")),
    "no-space.jpg": with_exif(_NO_SPACE, turned()),
    "truncated-directory.jpg": with_exif(turned(), count=9),
    "cut-off.jpg": jpeg(segment(b"Exif\0\0" + exif(turned())[:15])),
    "no-directory.jpg": jpeg(segment(b"Exif\0\0II*\0")),
    "no-header.jpg": jpeg(segment(b"Exif\0\0" + b"\xff" * 40)),
    "far-directory.jpg": jpeg(segment(b"Exif\0\0II*\0\xff\xff\xff\x7f")),
    "odd-raw-profile.png": png(chunk(b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(b"no hex"))),
}
_PNG = encoded("PNG")
# Pillow decodes these, and DALI refuses them or decodes them otherwise.
NOT_FOR_DALI: dict[str, bytes] = {
    "cmyk-without-adobe.jpg": cmyk_without_adobe(),
    "cmyk.jpg": encoded("JPEG", picture().convert("CMYK")),
    "without-end.png": _PNG[:-12],
    "bad-checksum.png": flipped(_PNG, len(_PNG) - 13),
    "stray-byte.jpg": behind(jpeg(), b"\xff\xdb", b"\0"),
    "stray-bytes.jpg": behind(jpeg(), b"\xff\xdb", b"stray"),
    "picture.gif": encoded("GIF"),
    "picture.webp": encoded("WEBP", lossless=True),
    "picture.bmp": encoded("BMP"),
    "picture.tiff": encoded("TIFF"),
    "picture.ppm": encoded("PPM"),
}
