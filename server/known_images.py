"""Which images the engine has, told by what was sent to it.

Knows vLLM's cache of processed images; not requests.
"""

from collections import OrderedDict
from collections.abc import Iterable
from threading import Lock

from vllm.multimodal.cache.base import (
    MultiModalCache,
    MultiModalProcessorCacheInItem,
    MultiModalProcessorCacheItemMetadata,
    MultiModalProcessorCacheOutItem,
)
from vllm.multimodal.cache.lru import LruKeyReplicatedSenderCache
from vllm.multimodal.inputs import MultiModalFeatureSpec
from vllm.renderers import BaseRenderer
from vllm.utils.cache import CacheInfo
from vllm.utils.mem_constants import GiB_bytes

from hidrop_server.adopt import adopt

SHARE = 0.5
"""Of the engine's cache, what this process counts on: the images used last. The rest is for what may be sent while a
request that was processed waits its turn."""
ROOM_IMAGES = 64
"""So many at least must fit into the rest; of a smaller cache nothing is counted on, and images are sent each time."""
MOST_UNSENT = 256
"""Processed images whose sending is remembered; one more is sent again another time."""


class KnownImages(LruKeyReplicatedSenderCache):
    """This process's list of the images in the engine's cache; requests with those are sent without their pixels.

    vLLM lists an image, and counts it as used, when it has been processed. A request that is refused after that never
    brings it to the engine, whose order of eviction then differs: a later request comes without pixels that the engine
    does not have, and fails with an error that asks the client to send it again. Here processing changes nothing:
    the list follows what was sent, by the operations of the engine's cache and in its order.
    """

    _unsent: OrderedDict[str, MultiModalProcessorCacheItemMetadata]
    _processing: dict[str, MultiModalProcessorCacheItemMetadata]
    """Known images of the request that is being processed, one at a time: it may find them gone before it is done."""
    _largest = 0
    """Bytes of an image."""
    _hits = 0
    _lookups = 0
    _told = CacheInfo(0, 0)
    _lock: Lock
    """Images are processed in a thread, and requests sent by the event loop."""

    def is_cached_item(self, mm_hash: str) -> bool:
        """Whether the engine has it."""
        with self._lock:
            known = mm_hash in self._cache and self._cache.capacity >= ROOM_IMAGES * self._largest
            if known:
                self._processing[mm_hash] = self._cache.cache[mm_hash]  # not as used
            return known

    def touch_sender_cache_item(self, mm_hash: str) -> None:
        """Not before it is sent."""

    def get_and_update_item(
        self, mm_item: MultiModalProcessorCacheInItem, mm_hash: str
    ) -> MultiModalProcessorCacheOutItem:
        """Pixels go on to the engine; without them it is an image that was known when this request's turn came."""
        self._lookups += 1
        if mm_item is None:
            self._hits += 1
            return None, self._processing[mm_hash].prompt_updates
        with self._lock:
            self._unsent[mm_hash] = image = MultiModalProcessorCacheItemMetadata(*mm_item)
            self._largest = max(self._largest, image.item_size)
            if len(self._unsent) > MOST_UNSENT:
                self._unsent.popitem(last=False)
        return mm_item

    def release_sender_touches(self) -> None:
        """A request has been processed."""
        self._processing.clear()

    def sent(self, features: Iterable[MultiModalFeatureSpec]) -> None:
        """Note that a request with these images is on its way; the engine takes requests in the order of sending."""
        images = [(feature.mm_hash or feature.identifier, feature.data is not None) for feature in features]
        with self._lock:
            for mm_hash, _ in images:
                self._cache.touch(mm_hash)
            for mm_hash, has_pixels in images:
                found = self._cache.get(mm_hash)
                if has_pixels:
                    self._cache.pop(mm_hash, None)
                    self._list(mm_hash, self._unsent.pop(mm_hash, found))

    def _list(self, mm_hash: str, image: MultiModalProcessorCacheItemMetadata | None) -> None:
        if image is not None and not self._cache.put_if_fits(mm_hash, image):
            self._cache.clear()  # of the engine's it may have displaced more than our share leaves room for

    def make_stats(self, *, delta: bool = False) -> CacheInfo:
        """Of what was processed, as in vLLM."""
        stats, before = CacheInfo(self._hits, self._lookups), self._told
        if not delta:
            return stats
        self._told = stats
        return stats - before

    def clear_cache(self) -> None:
        """Forget all."""
        with self._lock:
            self._cache.clear()
            self._unsent.clear()

    def invalidate(self, mm_hash: str) -> None:
        """The engine has told that it lacks one."""
        with self._lock:
            self._cache.pop(mm_hash, None)


def know_images(renderer: BaseRenderer) -> None:
    """Give the renderer this list in place of vLLM's; other caches, which need none of this, stay as they are."""
    stock = renderer.mm_processor_cache
    if isinstance(stock, LruKeyReplicatedSenderCache):
        known = adopt(KnownImages, stock)
        size = SHARE * stock._cache.capacity / GiB_bytes
        known._cache = MultiModalCache.get_lru_cache(size, MultiModalProcessorCacheItemMetadata)
        known._unsent, known._processing, known._lock = OrderedDict(), {}, Lock()
        renderer._mm_processor_cache = known
