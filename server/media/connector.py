"""Fetch and decode media; what a client should not send is answered with 4xx, not 500."""

import base64
import binascii
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from vllm.exceptions import VLLMError
from vllm.multimodal.media import MEDIA_CONNECTOR_REGISTRY, ImageMediaIO, MediaConnector
from vllm.multimodal.media.base import MediaIO

from hidrop_server.control.settings import MEDIA_CONNECTOR
from hidrop_server.media.addresses import Network
from hidrop_server.media.fetching import CheckedConnection
from hidrop_server.media.images import MediaRefused, check_image, check_size, limit_decoder

CLIENT_FAULTS = (MediaRefused, ValueError, NotImplementedError, OSError)  # ours; vLLM's for bad URLs and missing files


def register_connector(on_refused: Callable[[], None], networks: Sequence[Network] = ()) -> None:
    """Register our connector in this process; URLs may lead to ``networks`` although they are not public."""
    limit_decoder()
    connector = partial(HidropMediaConnector, on_refused=on_refused, networks=networks)
    MEDIA_CONNECTOR_REGISTRY.register(MEDIA_CONNECTOR)(connector)


class HidropMediaConnector(MediaConnector):
    """vLLM's connector, with remote fetching off until the user names the domains."""

    def __init__(
        self, *args: Any, on_refused: Callable[[], None], networks: Sequence[Network] = (), **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        self.on_refused = on_refused
        self.connection = CheckedConnection(self.allowed_media_domains, networks)

    def load_from_url(self, url: str, media_io: MediaIO[Any], **kwargs: Any) -> Any:
        """Stock loading; MediaRefused for what is the client's fault."""
        try:
            return super().load_from_url(url, _guarded(media_io), **kwargs)
        except CLIENT_FAULTS as error:
            raise self._refuse(error) from None

    async def load_from_url_async(self, url: str, media_io: MediaIO[Any], **kwargs: Any) -> Any:
        """Stock loading, see :meth:`load_from_url`."""
        try:
            return await super().load_from_url_async(url, _guarded(media_io), **kwargs)
        except CLIENT_FAULTS as error:
            raise self._refuse(error) from None

    def _refuse(self, error: Exception) -> MediaRefused:
        self.on_refused()
        return error if isinstance(error, MediaRefused) else MediaRefused(_text(error))

    def _assert_url_in_allowed_media_domains(self, url_spec: Any) -> None:
        """Refuse all URLs while no domain is allowed; otherwise :attr:`connection` checks the domain at every hop."""
        if not self.allowed_media_domains:
            raise MediaRefused(
                "this server fetches no remote media: send the image as a data: URL, or start the "
                "server with --allowed-media-domains"
            )

    def _load_file_url(self, url_spec: Any, media_io: MediaIO[Any]) -> Any:
        if self.allowed_local_media_path is None:
            raise MediaRefused(
                "this server reads no local files: send the image as a data: URL, or start the "
                "server with --allowed-local-media-path"
            )
        return super()._load_file_url(url_spec, media_io)


class Decoder(MediaIO[Any]):
    """Stock decoding of images behind our limits; every error of a decoder is the file's fault, but a lack of memory.

    Pillow's readers answer damaged files with ``SyntaxError``, ``RuntimeError``, ``AttributeError`` and others. A
    file's bytes say what it is; the type that its URL states is ignored.
    """

    def __init__(self, inner: ImageMediaIO) -> None:
        self.inner = inner

    def get_max_bytes(self) -> Any:
        """Size limit of a download, in bytes."""
        return self.inner.get_max_bytes()

    def load_bytes(self, data: bytes) -> Any:
        """Decode a file."""
        check_size(len(data))
        try:
            return self.inner.load_bytes(check_image(data))
        except (VLLMError, MemoryError):
            raise
        except Exception as error:
            raise MediaRefused(_text(error)) from None

    def load_base64(self, media_type: str, data: str) -> Any:
        """Decode a data: URL."""
        return self.load_bytes(_from_base64(data))

    def load_file(self, filepath: Path) -> Any:
        """Decode a local file."""
        return self.load_bytes(filepath.read_bytes())


def _guarded(media_io: MediaIO[Any]) -> MediaIO[Any]:
    return Decoder(media_io) if isinstance(media_io, ImageMediaIO) else media_io


def _from_base64(data: str) -> bytes:
    """Decode strictly, after checking the size."""
    check_size(len(data) // 4 * 3 - data[-2:].count("="))
    try:
        return base64.b64decode(data, validate=True)
    except (binascii.Error, ValueError):
        raise MediaRefused("the data: URL is not base64") from None


def _text(error: Exception) -> str:
    """The error as one line, without the path that an ``OSError`` shows."""
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return " ".join(text.split()) or f"cannot decode the media ({type(error).__name__})"
