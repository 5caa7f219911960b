"""The corpus of bad input: each is answered as it should be, soon, and leaves nothing behind."""

import json
from collections.abc import Iterator
from typing import Any, NamedTuple

import httpx
import psutil
import pytest
from PIL import Image

from tests.server.harness import Server, content, data_url, image_url, picture, png_that_claims
from tests.server.media.files import PDF, SVG, animated, bomb, palette_with_alpha, saved, sixteen_bits, turned
from tests.server.processes import api_process, forget_peak, held_mib, peak_mib

pytestmark = pytest.mark.server

MORE_MIB = 160.0
"""What one bad request may add to the API process for a moment. A body of 28 MiB is held three to five times, as the
moment of its parts' release has it; the bomb unpacks to 169, and becomes 845 as RGB."""
KEPT_MIB = 60.0
"""What the whole corpus may leave there: less than any one of its large files."""


class Entry(NamedTuple):
    """A request, the status it must have, and what its message must say."""

    status: int
    says: str
    images: list[str]
    more: dict[str, Any]
    text: str = "what colour is the circle ?"


def file(status: int, says: str, *files: bytes) -> Entry:
    return Entry(status, says, [data_url(each) for each in files], {})


def url(says: str, address: str) -> Entry:
    return Entry(400, says, [address], {})


def asks(status: int, says: str, **more: Any) -> Entry:
    return Entry(status, says, [image_url()], more)


RGB = Image.new("RGB", (192, 192), (200, 20, 20))
KNOWN = {"type": "text", "text": "what colour is the circle ?"}
CORPUS: dict[str, Entry] = {
    "truncated PNG": file(400, "truncated", picture()[:200]),
    "truncated JPEG": file(400, "truncated", picture(0, "JPEG")[:-400]),
    "truncated WebP": file(400, "", picture(0, "WEBP")[:-200]),
    "zero bytes": file(400, "not an image", b""),
    "an empty URL": url("empty", ""),
    "SVG": file(400, "not an image", SVG),
    "PDF": file(400, "not an image", PDF),
    "animated GIF": file(400, "frame", animated("GIF")),
    "animated WebP": file(400, "frame", animated("WEBP")),
    "1 x 20000": file(400, "200 times", saved(Image.new("RGB", (1, 20_000)), "PNG")),
    "20000 x 1": file(400, "200 times", saved(Image.new("RGB", (20_000, 1)), "PNG")),
    "a bomb of 169 megapixels": file(400, "VLLM_MAX_IMAGE_PIXELS", bomb()),
    "a header of 400 megapixels": file(400, "VLLM_MAX_IMAGE_PIXELS", png_that_claims(20_000, 20_000)),
    "a file over the limit": file(400, "VLLM_MAX_MEDIA_DOWNLOAD_SIZE_MB", bytes((20 << 20) + 1)),
    "17 images": file(400, "At most", *[picture()] * 17),
    "bad base64": url("base64", "data:image/png;base64,@@@@"),
    "base64 of the wrong length": url("base64", "data:image/png;base64,abcde"),
    "a file of the server": url("--allowed-local-media-path", "file:///etc/passwd"),
    "a loopback URL": url("--allowed-media-domains", "http://127.0.0.1:9/image.png"),
    "a metadata URL": url("--allowed-media-domains", "http://169.254.169.254/latest/meta-data"),
    "an address without a scheme": url("URL", "//127.0.0.1/image.png"),
    "an unknown option": asks(400, "known: hidrop", vllm_xargs={"hidrop_kep": [1]}),
    "options of the wrong type": asks(400, "vllm_xargs", vllm_xargs=[1]),
    "a number of nothing": asks(400, "keep", vllm_xargs={"hidrop_keep": [float("nan")] * 8}),
    "an infinite number": asks(400, "keep", vllm_xargs={"hidrop_keep": [float("inf")] * 8}),
    "a temperature of nothing": asks(400, "temperature", temperature=float("nan")),
    "messages of the wrong type": asks(400, "messages", messages="hello"),
    "an image of the wrong type": asks(
        400, "", messages=[{"role": "user", "content": [{"type": "image_url", "image_url": 7}]}]
    ),
    "a part that only Python callers have": asks(
        400, "part must be one of", messages=[{"role": "user", "content": [{"type": "image_pil", "image_pil": "x"}]}]
    ),
    "an image without a type": asks(
        400, "part must be one of", messages=[{"role": "user", "content": [{"image_url": image_url()}, KNOWN]}]
    ),
    "a truncation to nothing": asks(400, "cut off an image", truncate_prompt_tokens=0),
    "a truncation that cuts the image's place": asks(400, "cut off an image", truncate_prompt_tokens=3),
    "a truncation from the left": asks(400, "cut off an image", truncate_prompt_tokens=3, truncation_side="left"),
    "a truncation that cuts the image": asks(400, "split or drop", truncate_prompt_tokens=10),
    "a truncation that cuts nothing": asks(200, "", truncate_prompt_tokens=600),
    "more sequences than the queue": asks(400, "--max-num-queued-reqs", n=2000, temperature=1),
    "half a letter": asks(400, "UTF-8", stop=["\ud800"]),
    "half a letter in an id": asks(400, "UTF-8", request_id="a\udc00"),
    "half a letter in a name": asks(400, "UTF-8", metadata={"\ud800": "x"}),
    "half a letter of an image's name": asks(
        400,
        "UTF-8",
        messages=[{"role": "user", "content": [{"type": "image_url", "image_url": None, "uuid": "\ud800"}]}],
    ),
    "a long id": asks(400, "request_id: longer than 256", request_id="x" * 30_000),
    "a long name of an image": asks(
        400,
        "at most 256",
        messages=[{"role": "user", "content": [{"type": "image_url", "image_url": None, "uuid": "x" * 257}]}],
    ),
    "an option at the top": asks(400, "vllm_xargs", hidrop="off"),
    "true for a number of tokens": asks(400, "true and false mean nothing", vllm_xargs={"hidrop_keep": [True] * 8}),
    "true for a number": asks(400, "n: must be a number", n=True),
    "another model": asks(404, "does not exist", model="gpt-4"),
    "a prompt over the model's length": Entry(400, "4096", [image_url()], {}, "red " * 5000),
    "pixels under a wrong type": Entry(200, "", [data_url(picture(0, "JPEG")).replace("image/png", "text/html")], {}),
    "CMYK": file(200, "", saved(RGB.convert("CMYK"), "JPEG")),
    "16 bits": file(200, "", sixteen_bits()),
    "a palette with a transparent colour": file(200, "", palette_with_alpha()),
    "turned by EXIF": file(200, "", turned("top")),
    "one pixel": file(200, "", saved(Image.new("RGB", (1, 1)), "PNG")),
    "the image token in text": Entry(200, "", [image_url()], {}, "what is <image> this <image> ?"),
    "the image token alone": Entry(200, "", [], {}, "<image> <image>"),
}


@pytest.fixture(scope="module")
def process(server: Server) -> psutil.Process:
    return api_process(server.url)


@pytest.fixture(scope="module")
def first_answer(server: Server) -> str:
    return content(server.chat([image_url()]))


@pytest.fixture(autouse=True)
def nothing_is_left(server: Server, process: psutil.Process) -> Iterator[None]:
    """Around every entry, what is quickly seen: memory, the next answer, the engine's books."""
    before = held_mib(process)
    forget_peak(process)
    yield
    assert peak_mib(process) - before < MORE_MIB
    server.chat([], "red", max_tokens=1)
    assert server.http.get("/ready").status_code == 200


@pytest.fixture(scope="module")
def seconds() -> Iterator[dict[str, float]]:
    """How long each 4xx took, printed at the end (``pytest -s``)."""
    taken: dict[str, float] = {}
    yield taken
    slowest = sorted(taken, key=lambda name: -taken[name])[:5]
    print("\nslowest 4xx:", ", ".join(f"{name} {taken[name]:.3f} s" for name in slowest))


def post(server: Server, body: bytes, **headers: str) -> httpx.Response:
    headers = {"Content-Type": "application/json", **headers}
    return server.http.post("/v1/chat/completions", content=body, headers=headers)


def post_entry(server: Server, name: str) -> httpx.Response:
    entry = CORPUS[name]
    body = server.body(entry.images, entry.text, max_tokens=3) | entry.more
    return post(server, json.dumps(body).encode())  # with NaN, as a careless client writes it


@pytest.mark.parametrize("name", CORPUS)
def test_bad_input_is_answered_as_it_should_be(server: Server, name: str, seconds: dict[str, float]) -> None:
    entry = CORPUS[name]
    response = post_entry(server, name)
    assert response.status_code == entry.status, response.text[:1000]
    if entry.status != 200:
        seconds[name] = response.elapsed.total_seconds()
        error = response.json()["error"]
        assert entry.says in error["message"]
        assert len(error["message"]) < 2000


@pytest.mark.parametrize("digits", [18, 30, 5000])
def test_a_number_too_large_for_the_engine_is_refused_or_bounded(server: Server, digits: int) -> None:
    keeps = "[" + ",".join(["1" * digits] * len(server.schedule.stages)) + "]"
    body = json.dumps(server.body([image_url()], max_tokens=3, vllm_xargs={"hidrop_keep": "KEEPS"}))
    response = post(server, body.replace('"KEEPS"', keeps).encode())
    assert response.status_code in (200, 400), response.text
    body = json.dumps(server.body([image_url()], max_tokens=3)).replace('"temperature": 0', f'"seed": {"1" * digits}')
    assert post(server, body.encode()).status_code in (200, 400)


@pytest.mark.parametrize("states_length", [True, False])
def test_a_body_of_64_megabytes_is_a_413(server: Server, states_length: bool) -> None:
    body = bytes(64 << 20)
    parts = (body[start : start + (1 << 20)] for start in range(0, len(body), 1 << 20))
    headers = {"Content-Type": "application/json"}
    response = server.http.post("/v1/chat/completions", content=body if states_length else parts, headers=headers)
    assert response.status_code == 413
    assert "--max-body-mb" in response.json()["error"]["message"]


@pytest.mark.parametrize("body", [b"", b"{", b"null", b"[]", b'"x"', b"\xff\xfe", b"[" * 100_000, b'{"a":' * 100_000])
def test_what_is_no_request_is_a_400(server: Server, body: bytes) -> None:
    assert post(server, body).status_code == 400


def test_a_body_of_another_type_is_refused(server: Server) -> None:
    assert post(server, b"a=b", **{"Content-Type": "application/x-www-form-urlencoded"}).status_code in (400, 415)


def test_a_header_of_a_megabyte_is_refused(server: Server) -> None:
    response = post(server, b"{}", **{"X-Long": "x" * (1 << 20)})
    assert response.status_code == 431


def test_after_the_whole_corpus_all_is_as_before(
    server: Server, process: psutil.Process, first_answer: str, seconds: dict[str, float]
) -> None:
    """A second time: the first, above, fills what is kept, decoders, buffers, caches."""
    if not seconds:
        pytest.skip("needs the tests before it")
    before = held_mib(process)
    for name in CORPUS:
        post_entry(server, name)
    forget_peak(process)  # of one request after another; that of each was looked at above
    assert held_mib(process) - before < KEPT_MIB
    assert content(server.chat([image_url()])) == first_answer
    assert server.metric("vllm:kv_cache_usage_perc") == 0
