"""`minillm serve`."""

from minillm.cli.console import err
from minillm.cli.options import configured
from minillm.settings import ServeConfig


@configured(ServeConfig)
def serve(*, cfg: ServeConfig) -> None:
    """Serve a model: OpenAI-compatible API and a chat page."""
    from minillm.serve.server import run_server

    run_server(cfg, announce=lambda line: err.print(line, markup=False, soft_wrap=True))
