"""Fetch and decode media under rules that answer 4xx, not 500, to what a client should not send.

Knows vLLM's connector, which `VLLM_MEDIA_CONNECTOR` names; not HTTP routes.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from vllm.exceptions import VLLMError, VLLMValidationError
from vllm.multimodal.media import MEDIA_CONNECTOR_REGISTRY, MediaConnector
from vllm.multimodal.media.base import MediaIO

from hidrop_server.environment import MEDIA_CONNECTOR

CLIENT_FAULTS = (ValueError, NotImplementedError)
"""What vLLM's connector raises for bad URLs; network errors are others and stay what they are."""


class MediaRefused(VLLMValidationError):
    """An image, or a URL, that this server does not take; one line, answered with 400."""


def register_connector(on_refused: Callable[[], None]) -> None:
    """Make the connector known by its name in this process; ``on_refused`` is called for every refusal."""
    MEDIA_CONNECTOR_REGISTRY.register(MEDIA_CONNECTOR)(partial(HidropMediaConnector, on_refused=on_refused))


class HidropMediaConnector(MediaConnector):
    """vLLM's connector, with remote fetching off until the user names the domains."""

    def __init__(self, *args: Any, on_refused: Callable[[], None], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.on_refused = on_refused

    def load_from_url(self, url: str, media_io: MediaIO[Any], **kwargs: Any) -> Any:
        """Stock loading.

        Raises:
            MediaRefused: the client's fault.
        """
        try:
            return super().load_from_url(url, Decoder(media_io), **kwargs)
        except (*CLIENT_FAULTS, MediaRefused) as error:
            raise self._refuse(error) from None

    async def load_from_url_async(self, url: str, media_io: MediaIO[Any], **kwargs: Any) -> Any:
        """Stock loading, see :meth:`load_from_url`."""
        try:
            return await super().load_from_url_async(url, Decoder(media_io), **kwargs)
        except (*CLIENT_FAULTS, MediaRefused) as error:
            raise self._refuse(error) from None

    def _refuse(self, error: Exception) -> MediaRefused:
        self.on_refused()
        return error if isinstance(error, MediaRefused) else MediaRefused(_text(error))

    def _assert_url_in_allowed_media_domains(self, url_spec: Any) -> None:
        if not self.allowed_media_domains:
            raise MediaRefused(
                "this server fetches no remote media: send the image as a data: URL, or start the "
                "server with --allowed-media-domains"
            )
        super()._assert_url_in_allowed_media_domains(url_spec)

    def _load_file_url(self, url_spec: Any, media_io: MediaIO[Any]) -> Any:
        if self.allowed_local_media_path is None:
            raise MediaRefused(
                "this server reads no local files: send the image as a data: URL, or start the "
                "server with --allowed-local-media-path"
            )
        return super()._load_file_url(url_spec, media_io)


class Decoder(MediaIO[Any]):
    """Stock decoding, where whatever a decoder stumbles over is the file's fault.

    Pillow's readers answer damaged files with ``SyntaxError``, ``RuntimeError``, ``AttributeError`` and others; only
    a lack of memory is ours.
    """

    def __init__(self, inner: MediaIO[Any]) -> None:
        self.inner = inner

    def get_max_bytes(self) -> Any:
        """Size limit of a download."""
        return self.inner.get_max_bytes()

    def load_bytes(self, data: bytes) -> Any:
        """Decode a downloaded file."""
        return self._decode(self.inner.load_bytes, data)

    def load_base64(self, media_type: str, data: str) -> Any:
        """Decode a data: URL."""
        return self._decode(self.inner.load_base64, media_type, data)

    def load_file(self, filepath: Path) -> Any:
        """Decode a local file."""
        return self._decode(self.inner.load_file, filepath)

    def _decode(self, load: Callable[..., Any], *args: Any) -> Any:
        try:
            return load(*args)
        except (VLLMError, MemoryError):
            raise
        except Exception as error:
            raise MediaRefused(_text(error)) from None


def _text(error: Exception) -> str:
    """One line, without the path that an ``OSError`` shows."""
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return " ".join(text.split()) or f"cannot decode the media ({type(error).__name__})"
