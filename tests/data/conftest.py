"""What tests of downloads stand on."""

import threading
from collections.abc import Iterator

import pytest
from picture_server import PictureServer

from vltrain.data.downloads import Downloads


@pytest.fixture
def server() -> Iterator[PictureServer]:
    with PictureServer() as started:
        thread = threading.Thread(target=started.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield started
        started.ended.set()
        started.shutdown()
        thread.join()


@pytest.fixture
def downloader(tmp_path) -> Downloads:
    """Downloads from this machine, which is a private address."""
    return Downloads(
        tmp_path / "cache", timeout=5.0, retries=2, allow_private=True, first_pause=0.01
    )
