"""Fetch and decode media; what a client should not send is answered with 4xx, not 500."""

import asyncio
import base64
import binascii
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

from vllm import envs
from vllm.exceptions import VLLMError
from vllm.multimodal.media import MEDIA_CONNECTOR_REGISTRY, ImageMediaIO, MediaConnector, VideoMediaIO
from vllm.multimodal.media.base import MediaIO

from hidrop_server.control.settings import MEDIA_CONNECTOR
from hidrop_server.media.addresses import Network
from hidrop_server.media.fetching import CheckedConnection
from hidrop_server.media.images import MediaRefused, check_image, check_size, limit_decoder
from hidrop_server.media.videos import (
    FRAME_LIST,
    VideoLimits,
    bounded,
    check_container,
    check_frame_list,
    check_num_frames,
)

CLIENT_FAULTS = (MediaRefused, ValueError, NotImplementedError, OSError)  # ours; vLLM's for bad URLs and missing files


def register_connector(on_refused: Callable[[], None], videos: VideoLimits, networks: Sequence[Network] = ()) -> None:
    """Register our connector in this process; URLs may lead to ``networks`` although they are not public."""
    limit_decoder()
    at_once = asyncio.Semaphore(max(1, envs.VLLM_MEDIA_LOADING_THREAD_COUNT // 2))
    connector = partial(
        HidropMediaConnector, on_refused=on_refused, videos=videos, videos_at_once=at_once, networks=networks
    )
    MEDIA_CONNECTOR_REGISTRY.register(MEDIA_CONNECTOR)(connector)


class HidropMediaConnector(MediaConnector):
    """vLLM's connector, with remote fetching off until the user names the domains.

    Videos, those that are fetched included, take half of vLLM's threads for media (``videos_at_once``), so that images
    are read beside them.
    """

    def __init__(
        self,
        *args: Any,
        on_refused: Callable[[], None],
        videos: VideoLimits,
        videos_at_once: asyncio.Semaphore | None = None,
        networks: Sequence[Network] = (),
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.on_refused = on_refused
        self.videos = videos
        self.videos_at_once = videos_at_once or nullcontext()
        self.connection = CheckedConnection(self.allowed_media_domains, networks)

    def load_from_url(self, url: str, media_io: MediaIO[Any], **kwargs: Any) -> Any:
        """Stock loading; MediaRefused for what is the client's fault."""
        try:
            return super().load_from_url(url, self._guarded(media_io), **kwargs)
        except CLIENT_FAULTS as error:
            raise self._refuse(error) from None

    async def load_from_url_async(self, url: str, media_io: MediaIO[Any], **kwargs: Any) -> Any:
        """Stock loading, see :meth:`load_from_url`."""
        turn = self.videos_at_once if isinstance(media_io, VideoMediaIO) else nullcontext()
        try:
            async with turn:
                return await super().load_from_url_async(url, self._guarded(media_io), **kwargs)
        except CLIENT_FAULTS as error:
            raise self._refuse(error) from None

    def _guarded(self, media_io: MediaIO[Any]) -> MediaIO[Any]:
        if isinstance(media_io, VideoMediaIO):
            return VideoDecoder(media_io, self.videos)
        return Decoder(media_io) if isinstance(media_io, ImageMediaIO) else media_io

    def _refuse(self, error: Exception) -> MediaRefused:
        self.on_refused()
        return error if isinstance(error, MediaRefused) else MediaRefused(_text(error))

    def _assert_url_in_allowed_media_domains(self, url_spec: Any) -> None:
        """Refuse all URLs while no domain is allowed; otherwise :attr:`connection` checks the domain at every hop."""
        if not self.allowed_media_domains:
            raise MediaRefused(
                "this server fetches no remote media: send the media as a data: URL, or start the "
                "server with --allowed-media-domains"
            )

    def _load_file_url(self, url_spec: Any, media_io: MediaIO[Any]) -> Any:
        if self.allowed_local_media_path is None:
            raise MediaRefused(
                "this server reads no local files: send the media as a data: URL, or start the "
                "server with --allowed-local-media-path"
            )
        return super()._load_file_url(url_spec, media_io)


class Decoder(MediaIO[Any]):
    """Stock decoding behind our limits; every error of a decoder is the file's fault, but a lack of memory.

    Pillow's readers answer damaged files with ``SyntaxError``, ``RuntimeError``, ``AttributeError`` and others. A
    file's bytes say what it is; the type that its URL states is ignored. ``check`` returns what is to be decoded.
    """

    def __init__(self, inner: MediaIO[Any], check: Callable[[bytes], bytes] = check_image) -> None:
        self.inner = inner
        self.check = check

    def get_max_bytes(self) -> Any:
        """Size limit of a download, in bytes."""
        return self.inner.get_max_bytes()

    def load_bytes(self, data: bytes) -> Any:
        """Decode a file."""
        check_size(len(data))
        with _faults_of_the_file():
            return self.inner.load_bytes(self.check(data))

    def load_base64(self, media_type: str, data: str) -> Any:
        """Decode a data: URL."""
        return self.load_bytes(_from_base64(data))

    def load_file(self, filepath: Path) -> Any:
        """Decode a local file."""
        check_size(filepath.stat().st_size)
        return self.load_bytes(filepath.read_bytes())


class VideoDecoder(Decoder):
    """Stock sampling and decoding of videos behind our limits: files, and lists of JPEG files."""

    def __init__(self, inner: VideoMediaIO, limits: VideoLimits) -> None:
        super().__init__(inner, check_container)
        loader: type = type(inner.video_loader)
        self.limits = limits
        inner.video_loader = bounded(loader, limits)()
        inner.image_io = Decoder(inner.image_io)
        inner.num_frames = min(inner.num_frames, limits.max_frames) if inner.num_frames > 0 else limits.max_frames

    def load_base64(self, media_type: str, data: str) -> Any:
        """Decode a data: URL; only the type of a list of frames is believed."""
        if media_type.lower() != FRAME_LIST:
            return super().load_base64(media_type, data)
        check_size(len(data) // 4 * 3)
        check_num_frames(data.count(",") + 1, self.limits)
        check_frame_list([_from_base64(file) for file in data.split(",")], self.limits)
        with _faults_of_the_file():
            return self.inner.load_base64(media_type, data)


@contextmanager
def _faults_of_the_file() -> Iterator[None]:
    """Turn every error of a decoder into MediaRefused, but a lack of memory."""
    try:
        yield
    except (VLLMError, MemoryError):
        raise
    except Exception as error:
        raise MediaRefused(_text(error)) from None


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
