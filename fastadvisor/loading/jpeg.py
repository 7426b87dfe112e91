"""Read the header of a JPEG in a few microseconds: its size, and whether all decoders read the file alike."""

from PIL import Image

TAIL = 4096
"""A complete file has its end marker within so many bytes of its end; some cameras append data after it."""

FRAMES = frozenset({0xC0, 0xC1, 0xC2})
"""Markers of a frame that is Huffman coded: baseline, extended and progressive."""

OTHER_FRAMES = frozenset({0xC3, 0xC5, 0xC6, 0xC7, 0xC9, 0xCA, 0xCB, 0xCD, 0xCE, 0xCF})
"""Markers of a frame that is lossless, hierarchical or arithmetic coded, which hardly any decoder knows."""

EXIF, SCAN = 0xE1, 0xDA


def plain_jpeg_size(data: bytes) -> tuple[int, int] | None:
    """Return (width, height) in pixels of a plain, complete JPEG; None for anything else.

    Anything else means other formats, CMYK, images that an EXIF tag turns, and truncated files, whatever their names are.
    Pillow decodes those one by one, and reports what is wrong with them.
    """
    if data[:2] != b"\xff\xd8" or data.rfind(b"\xff\xd9", max(2, len(data) - TAIL)) < 0:
        return None
    position = 2
    while position + 10 <= len(data) and data[position] == 0xFF:
        marker = data[position + 1]
        if marker == 0xFF:  # padding
            position += 1
            continue
        if marker in FRAMES:
            bits, components = data[position + 4], data[position + 9]
            height = data[position + 5] << 8 | data[position + 6]
            width = data[position + 7] << 8 | data[position + 8]
            return (width, height) if bits == 8 and components in (1, 3) and width and height else None
        length = data[position + 2] << 8 | data[position + 3]
        if marker in OTHER_FRAMES or marker == SCAN or length < 2:
            return None
        if marker == EXIF and _is_rotated(data[position + 4 : position + 2 + length]):
            return None
        position += 2 + length
    return None


def _is_rotated(segment: bytes) -> bool:
    """Return whether an APP1 segment holds an EXIF orientation other than upright."""
    if not segment.startswith(b"Exif\x00\x00"):
        return False
    exif = Image.Exif()
    try:
        exif.load(segment)
        return bool(exif.get(0x0112, 1) != 1)
    except Exception:  # damaged EXIF raises struct.error, SyntaxError and more; Pillow may read the image all the same
        return True
