"""Files that have to be unpacked: .gz, .zst and .parquet, and what is wrong with them."""

import contextlib
import gzip
import io
import sys
import zlib
from collections.abc import Iterator
from typing import BinaryIO

from configs import DATA, ENVIRONMENT, Stop

PACKED = (".gz", ".zst", ".parquet")  # what can only be read from its beginning
FEW = 1 << 12  # packed bytes unpacked at once: of a bomb they give a hundred MB


def missing(package: str, path: str) -> Stop:
    return Stop(ENVIRONMENT, f"{path} is read by the package {package}, which is missing: pip "
                f"install {package}, or nano360[data]")


class Zst(io.RawIOBase):
    """A .zst file as it is read. The package's own reader takes one that is cut short for whole."""

    def __init__(self, path: str):
        try:
            import zstandard
        except ImportError as error:
            raise missing("zstandard", path) from error
        self.file, self.packer, self.rest = open(path, "rb"), zstandard.ZstdDecompressor(), None
        self.frame = None  # several may follow one another

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:
        while not (n := self.rest.readinto(buffer) if self.rest else 0):
            ended = self.frame is None or self.frame.eof
            packed = (self.frame.unused_data if self.frame and ended else b"") or (
                self.file.read(FEW))
            if not packed and not ended:
                raise EOFError("it is cut short")
            if not packed:
                break
            self.frame = self.packer.decompressobj() if ended else self.frame
            self.rest = io.BytesIO(self.frame.decompress(packed))
        return n

    def close(self) -> None:
        self.file.close()
        super().close()


def open_bytes(path: str) -> BinaryIO:
    """A file, unpacked as it is read."""
    if path.lower().endswith(".gz"):
        return gzip.open(path)
    if path.lower().endswith(".zst"):
        return io.BufferedReader(Zst(path))
    return open(path, "rb")


@contextlib.contextmanager
def whole(path: str) -> Iterator[None]:
    """Say so where a packed file is cut short, or is none. Raises Stop(DATA)."""
    try:
        yield
    except Exception as error:
        own = [packer.ZstdError] if (packer := sys.modules.get("zstandard")) else []
        if not isinstance(error, (EOFError, zlib.error, gzip.BadGzipFile, UnicodeError, *own)):
            raise
        raise Stop(DATA, f"{path} is damaged: {error}; fetch or copy it again") from error


def read_parquet(path: str, columns: list[str]) -> Iterator[tuple[int, dict]]:
    """(row from 1, object) of a .parquet file."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise missing("pyarrow", path) from error
    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path, page_checksum_verification=True) as file:
            has = file.schema_arrow.names
            for batch in file.iter_batches(256, columns=[c for c in columns if c in has] or has):
                for row in batch.to_pylist():
                    yield (number := number + 1), row
    except (pyarrow.ArrowException, OSError, UnicodeError) as error:
        raise Stop(DATA, f"{path} is broken after row {number}: {error}") from error
