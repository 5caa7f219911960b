"""The OpenAI-compatible server: vLLM's own FastAPI application, extended; installed as `hidrop_server`.

The way of a request:

1. ``http/access`` asks for the key; ``http/exchanges`` times the request, or refuses it while the server drains.
2. ``http/bodies`` counts header and body as they arrive (``http/json_bounds``), and parses the body once.
3. ``http/body_check`` checks the parsed body up to its first fault: fields by the types of vLLM's request models
   (``http/typed_fields``), every value (``http/body_walk``), parts of messages (``media/parts``), and pruning options
   (``control/options``).
4. vLLM's route, request model and renderer run, with our handlers (``serving``); ``media/connector`` fetches and
   decodes media (``media/fetching``, ``media/images``, ``media/videos``; each video in a ``media/video_process``).
5. ``engine`` plans the options in ``vllm_xargs``, for a 400 before anything is queued, and has grammars tried
   (``control/grammars``); then vLLM's engine runs, with the scheduler and workers of `vllm_hidrop`.
6. The engine's report comes with the outputs: it is counted when a sequence ends (``metrics``) and stands in the
   answer beside ``usage`` (``control/reports``). ``http/brief_errors`` cuts errors to one line.

``start`` starts the server: ``control/choice`` and ``control/arguments`` read the command line by the table in
``control/settings``, ``app`` builds the application, ``processes`` runs several. ``control/routes`` are our own.
"""

from hidrop_server.start import main

__all__ = ["main"]
