"""Serves a model with infinity over HTTP on a free port of this machine, until standard input ends.

Usage: infinity_serve.py MODEL_FOLDER THREADS
Says {"port", "versions"} when it answers, or {"unavailable": WHY}. The settings are infinity's own for its torch engine,
but for its warm-up, which computes batches of texts that nobody asks for here.
"""

import os
import sys

MODEL, THREADS = sys.argv[1:3]
os.environ["DO_NOT_TRACK"] = "1"
os.environ["INFINITY_ANONYMOUS_USAGE_STATS"] = "0"

import importlib.metadata  # noqa: E402
import json  # noqa: E402
import socket  # noqa: E402
import threading  # noqa: E402

PACKAGES = ["infinity_emb", "sentence-transformers", "transformers", "torch"]


def leave_with_input():
    sys.stdin.read()
    # The server's own way out waits for connections that the bench keeps.
    os._exit(0)


def main():
    # Libraries print while they work; what this script says must stay readable.
    said = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    try:
        import torch
        import uvicorn
        from infinity_emb.args import EngineArgs
        from infinity_emb.infinity_server import create_server

        torch.set_num_threads(int(THREADS))
        settings = EngineArgs(
            model_name_or_path=MODEL, engine="torch", device="cpu", served_model_name="model", model_warmup=False
        )
        app = create_server(engine_args_list=[settings])
        listener = socket.create_server(("127.0.0.1", 0))
        port = listener.getsockname()[1]
        versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in PACKAGES)

        class Server(uvicorn.Server):
            async def startup(self, sockets=None):
                await super().startup(sockets=sockets)
                if self.started:
                    print(json.dumps({"port": port, "versions": versions}), file=said, flush=True)

        threading.Thread(target=leave_with_input, daemon=True).start()
        config = uvicorn.Config(app, log_level="error", access_log=False, http="httptools", loop="auto")
        Server(config).run(sockets=[listener])
        raise RuntimeError("the server ended")
    except BaseException as error:
        print(json.dumps({"unavailable": f"{type(error).__name__}: {error}"[:500]}), file=said, flush=True)


main()
