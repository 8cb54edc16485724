"""Arrow stream files that are written batch by batch, to be mapped into memory later."""

from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

if TYPE_CHECKING:
    import pyarrow as pa


class ArrowStream:
    """Writes one file; what is held back is written when its `with` block ends well."""

    def __init__(self, path: Path, schema: "pa.Schema") -> None:
        import pyarrow as pa

        self._schema = schema
        self._file = pa.OSFile(str(path), "wb")
        self._stream = pa.ipc.new_stream(self._file, schema)

    def write_batch(self, columns: Iterable[Any]) -> None:
        """Add rows, given by column in the schema's order."""
        import pyarrow as pa

        arrays = [pa.array(c, f.type) for c, f in zip(columns, self._schema, strict=True)]
        self._stream.write_batch(pa.record_batch(arrays, self._schema))

    def finish(self) -> None:
        """Write what is held back; called once, before the file is closed."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is None:
            self.finish()
        self._stream.close()
        self._file.close()
