"""Fetch and decode media under rules that answer 4xx, not 500, to what a client should not send.

Importing this module registers the connector; `VLLM_MEDIA_CONNECTOR` names it. Knows vLLM's connector, not HTTP routes.
"""

from typing import Any

from PIL import Image
from vllm.exceptions import VLLMClientError, VLLMValidationError
from vllm.multimodal.media import MEDIA_CONNECTOR_REGISTRY, MediaConnector
from vllm.multimodal.media.base import MediaIO


class MediaRefused(VLLMValidationError):
    """An image, or a URL, that this server does not take."""


@MEDIA_CONNECTOR_REGISTRY.register("hidrop")
class HidropMediaConnector(MediaConnector):
    """vLLM's connector, with remote fetching off until the user names the domains."""

    def load_from_url(self, url: str, media_io: MediaIO[Any], **kwargs: Any) -> Any:
        """vLLM's loading.

        Raises:
            MediaRefused: the client's fault, one line.
        """
        try:
            return super().load_from_url(url, media_io, **kwargs)
        except Exception as error:
            raise _refused(error) or error from None

    async def load_from_url_async(self, url: str, media_io: MediaIO[Any], **kwargs: Any) -> Any:
        """vLLM's loading, see :meth:`load_from_url`."""
        try:
            return await super().load_from_url_async(url, media_io, **kwargs)
        except Exception as error:
            raise _refused(error) or error from None

    def _assert_url_in_allowed_media_domains(self, url_spec: Any) -> None:
        if not self.allowed_media_domains:
            raise MediaRefused(
                "this server fetches no remote media: send the image as a data: URL, or start the server with "
                "--allowed-media-domains"
            )
        super()._assert_url_in_allowed_media_domains(url_spec)

    def _load_file_url(self, url_spec: Any, media_io: MediaIO[Any]) -> Any:
        if self.allowed_local_media_path is None:
            raise MediaRefused(
                "this server reads no local files: send the image as a data: URL, or start the server with "
                "--allowed-local-media-path"
            )
        return super()._load_file_url(url_spec, media_io)


def _refused(error: Exception) -> MediaRefused | None:
    """The refusal for an error that the client caused; None for one of the server or the network."""
    if isinstance(error, VLLMClientError):
        return error if isinstance(error, MediaRefused) else None
    if isinstance(error, FileNotFoundError):
        return MediaRefused("no such file below --allowed-local-media-path")
    client_faults = (ValueError, NotImplementedError, SyntaxError, Image.DecompressionBombError)
    if isinstance(error, client_faults):
        return MediaRefused(" ".join(str(error).split()))
    return None
