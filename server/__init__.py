"""The OpenAI-compatible server: vLLM's own FastAPI application, extended; installed as `hidrop_server`.

One request, room by room:

1. ``http/access``, ``http/exchanges``: has it a key, is there time, does the server drain?
2. ``http/bodies``: header and body are counted as they come (``http/json_bounds``), the body is parsed once.
3. ``http/body_check``: the parsed body, up to its first fault: lengths by vLLM's own types (``http/typed_fields``),
   every value (``http/body_walk``), parts of messages (``media/parts``), wishes (``control/options``).
4. vLLM's route, request model and renderer, with our handlers (``serving``); media are fetched and decoded by
   ``media/connector`` (``media/fetching``, ``media/images``).
5. ``engine``: the wishes of ``vllm_xargs`` are planned, for a 400 before anything is queued; a grammar is tried
   (``control/grammars``); then vLLM's engine, whose scheduler and workers are `vllm_hidrop`'s.
6. The engine's report comes with the outputs: counted when a sequence ends (``metrics``), and put into the answer
   beside ``usage`` (``control/reports``). An error leaves in one line (``http/brief_errors``).

``start`` gets there: ``control/choice`` and ``control/arguments`` read the command line by the table of
``control/settings``, ``app`` builds the application, ``processes`` runs several. ``control/routes`` are ours.
"""

from hidrop_server.start import main

__all__ = ["main"]
