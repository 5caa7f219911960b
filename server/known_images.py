"""Which images the engine has, told by what was sent to it.

Knows vLLM's cache of processed images; not requests.
"""

from collections.abc import Iterable
from weakref import WeakValueDictionary

from vllm.multimodal.cache.base import (
    MultiModalProcessorCacheInItem,
    MultiModalProcessorCacheItemMetadata,
    MultiModalProcessorCacheOutItem,
)
from vllm.multimodal.cache.lru import LruKeyReplicatedSenderCache
from vllm.renderers import BaseRenderer

from hidrop_server.adopt import adopt


class KnownImages(LruKeyReplicatedSenderCache):
    """This process's list of the images in the engine's cache; requests with those are sent without their pixels.

    vLLM lists an image when it has been processed. A request that is refused after that, by anybody and for any reason,
    never brings it to the engine, and the next one with that image, or another one in flight, comes without pixels
    that the engine does not have: a 500. Here an image counts once it was sent; until then every request brings it.
    """

    _unsent: WeakValueDictionary[str, MultiModalProcessorCacheItemMetadata]
    """Of the listed images; one that is struck off the list is gone from here, too."""

    def is_cached_item(self, mm_hash: str) -> bool:
        """Whether the engine has it."""
        return mm_hash not in self._unsent and super().is_cached_item(mm_hash)

    def get_and_update_item(
        self, mm_item: MultiModalProcessorCacheInItem, mm_hash: str
    ) -> MultiModalProcessorCacheOutItem:
        """List an image; its pixels come back unless the engine has them."""
        if mm_item is not None and mm_hash in self._unsent:
            return mm_item
        is_listed = super().is_cached_item(mm_hash)
        answer = super().get_and_update_item(mm_item, mm_hash)
        if not is_listed and super().is_cached_item(mm_hash):  # else it is too large for the list
            self._unsent[mm_hash] = self._cache[mm_hash]
        return answer

    def sent(self, mm_hashes: Iterable[str]) -> None:
        """Note that a request with these images is on its way; the engine takes requests in the order of sending."""
        for mm_hash in mm_hashes:
            self._unsent.pop(mm_hash, None)


def know_images(renderer: BaseRenderer) -> None:
    """Give the renderer this list in place of vLLM's; other caches, which need none of this, stay as they are."""
    stock = renderer.mm_processor_cache
    if isinstance(stock, LruKeyReplicatedSenderCache):
        known = adopt(KnownImages, stock)
        known._unsent = WeakValueDictionary()
        renderer._mm_processor_cache = known
