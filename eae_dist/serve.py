"""Serves a trained model over HTTP, with a page to look at it:

    python -m eae_dist.serve --ckpt DIR [--latents DIR] [--host 127.0.0.1] [--port 8000] [key=value ...]

http://127.0.0.1:8000 is the page, and /openapi.json describes the interface. --latents is a folder that `python -m
eae_dist.encode` wrote; with it, the service finds neighbors among the data set's images. Ctrl-C and SIGTERM stop the service. It
needs `pip install -e '.[serve]'`.
"""

import argparse
import logging
import os
import signal
import socket
import sys
import warnings
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

from PIL import Image

from eae_dist.distributed.start import start_without_engine
from eae_dist.errors import UserError, UserFileError, is_users
from eae_dist.inference.service.batching import Batcher
from eae_dist.inference.service.guard import LOCAL_NAMES
from eae_dist.inference.service.model import ServedModel
from eae_dist.training.setup import how_to_judge

log = logging.getLogger("eae_dist")

WAITING = 1_024  # rows that may wait; a request has at most a quarter of them
CONNECTIONS, CONNECTIONS_OF_ONE = 512, 128  # of all clients, and of one address
EXTRA = ("fastapi", "uvicorn")
LOOPBACK = ("127.0.0.1", "localhost", "::1")


def serve(directory: Path, latents: Path | None, host: str, port: int, assignments: Sequence[str]) -> None:
    """Serves until it is stopped. Raises ValueError or OSError for what a user can correct."""
    import uvicorn

    from eae_dist.inference.service.app import create_app  # need the extra, as uvicorn does
    from eae_dist.inference.service.connections import limited_protocol

    with closing(bound(host, port)) as listening:
        served = ServedModel(directory, latents, assignments)
        hosts = LOCAL_NAMES if host in LOOPBACK else None
        with closing(Batcher(served.computations, served.config.evaluate.batch, WAITING)) as batcher:
            settings = uvicorn.Config(
                create_app(served, batcher, hosts),
                # On this machine alone all clients have one address.
                http=limited_protocol(None if hosts else CONNECTIONS_OF_ONE),
                log_config=None,
                log_level="warning",
                access_log=False,
                server_header=False,
                ws="none",
                lifespan="off",
                limit_concurrency=CONNECTIONS,
                timeout_graceful_shutdown=5,
            )
            name = f"[{host}]" if ":" in host else host
            of = f"{served.config.objective.name}, step {served.checkpoint.state['step']}"
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # uvicorn raises the signal again after it has stopped
            log.info("serving %s at http://%s:%d (Ctrl-C ends)", of, name, listening.getsockname()[1])
            uvicorn.Server(settings).run(sockets=[listening])


def bound(host: str, port: int) -> socket.socket:
    """Returns a socket that listens there, before a model is loaded. Raises ValueError or OSError that names the option."""
    if not 0 <= port <= 65535:
        raise UserError(f"--port={port} must lie in [0, 65535]; 0 takes a free one")
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        listening = socket.socket(family, kind)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
        listening.listen(CONNECTIONS)  # early clients wait, and no other process can listen here
    except OSError as error:
        raise UserFileError(
            f"--host={host} --port={port} cannot be bound: {error.strerror}; take another --port or --host"
        ) from error
    return listening


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(prog="python -m eae_dist.serve", description=__doc__.split(":\n")[0])
    parser.add_argument("--ckpt", type=Path, required=True, help="a checkpoint folder, or a run folder (its latest checkpoint)")
    parser.add_argument("--latents", type=Path, metavar="DIR", help="a folder that `python -m eae_dist.encode` wrote")
    parser.add_argument("--index", help=argparse.SUPPRESS)  # the old name of --latents
    parser.add_argument("--host", default="127.0.0.1", help="address to listen at; default: 127.0.0.1, this machine alone")
    parser.add_argument("--port", type=int, default=8000, help="default: 8000; 0: a free one")
    parser.add_argument(
        "settings", nargs="*", metavar="key=value", help="evaluate.batch (most rows of a forward pass), index.*, data.root"
    )
    arguments = parser.parse_intermixed_args(argv)
    if arguments.index is not None:
        parser.error("--index is now called --latents")
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise UserError("the service is one process; start it without a launcher")
        start_without_engine(how_to_judge(arguments.settings))
        serve(arguments.ckpt, arguments.latents, arguments.host, arguments.port, arguments.settings)
    except KeyboardInterrupt:
        pass
    except ModuleNotFoundError as error:
        if error.name not in EXTRA:
            raise
        sys.exit(f"error: the service needs {error.name}; pip install -e '.[serve]'")
    except Exception as error:
        if not is_users(error):
            raise
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
