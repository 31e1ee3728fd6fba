"""What SageMaker's model server starts in each worker: the toolkit's own service, with errors that clients can read.

The toolkit answers an error with the message and our traceback behind it. Here the client gets JSON and the log gets
the traceback. The server takes the one class of this module; `python -m` of it starts the server, which is Java.
"""

from __future__ import annotations

import json
import sys
import traceback
from typing import Any

try:
    from sagemaker_inference import default_handler_service, transformer
except ImportError:
    raise ImportError(
        "flash_mla.serving.sagemaker_service needs sagemaker-inference: pip install 'transformers-flash-mla[sagemaker]'"
    ) from None

from .sagemaker import check, count_error

__all__ = ["HandlerService"]


class HandlerService(default_handler_service.DefaultHandlerService):  # type: ignore[misc]
    """`initialize(context)` and `handle(data, context)` for the model server."""

    def __init__(self) -> None:
        service = transformer.Transformer()
        service.handle_error = _answer_error  # a static method of the toolkit's
        super().__init__(service)

    def initialize(self, context: Any) -> None:
        """Load the model.

        Raises: SystemExit: it cannot be loaded. The server would log any other error, report the worker as healthy and
            load again at each request.
        """
        try:
            super().initialize(context)
        except Exception as error:
            traceback.print_exc()
            raise SystemExit(f"flash_mla.serving.sagemaker_service: the model was not loaded: {error}") from error


def _answer_error(context: Any, error: Any, trace: str) -> list[str]:
    """Status and JSON body for `error`, a BaseInferenceToolkitError with the status that it is to have."""
    status, message = error.status_code, str(error.message)
    # The toolkit decodes a body before it asks us, and calls bytes that are no UTF-8 an error of the server.
    if isinstance(sys.exc_info()[1], UnicodeDecodeError):
        status, message = 400, "the body must be UTF-8"
        count_error(status)
    if status >= 500:
        print(trace, file=sys.stderr, flush=True)
        message = "internal error; the log says more"
    phrase = message.replace("\r", " ").replace("\n", " ")
    context.set_response_status(code=status, phrase=phrase)
    context.set_response_content_type(0, "application/json")
    return [json.dumps({"error": {"status": status, "message": message}})]


if __name__ == "__main__":
    from sagemaker_inference import environment

    # Here, since the server's /ping says 200 while its workers die of the same mistake one after the other.
    try:
        check(environment.model_dir)
    except (OSError, ValueError) as error:
        sys.exit(f"flash_mla.serving.sagemaker_service: {error}")

    from sagemaker_inference import model_server

    # By name: the server's workers are processes of their own, which import it.
    model_server.start_model_server(handler_service="flash_mla.serving.sagemaker_service")
