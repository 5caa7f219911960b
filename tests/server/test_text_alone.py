"""A server of text alone starts, answers text, and refuses an image with the reason."""

import pytest

from tests.server.conftest import serving
from tests.server.harness import image_url

pytestmark = pytest.mark.server


@pytest.mark.parametrize("flags", [["--language-model-only"], ["--limit-mm-per-prompt.image", "0"]], ids=" ".join)
def test_text_is_answered_and_an_image_refused(flags: list[str]) -> None:
    with serving([*flags, "--enforce-eager"]) as server:
        server.chat([], max_tokens=2)
        response = server.http.post("/v1/chat/completions", json=server.body([image_url()]))
        assert response.status_code == 400, response.text
        assert "takes no image" in response.json()["error"]["message"]
        assert server.http.get("/ready").status_code == 200
