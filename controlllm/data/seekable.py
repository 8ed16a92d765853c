"""What a file of ours must say for itself before others read it."""

import io


class Seekable(io.RawIOBase):
    """Keeps the place in a file of `size` bytes; reading is the subclass's."""

    def __init__(self, size: int):
        self._size, self._at = size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = offset + (0, self._at, self._size)[whence]
        return self._at
