"""Processes with a gloo group between them, that tests hand functions to."""

from __future__ import annotations

import os
import traceback
from collections.abc import Callable
from typing import Any

import torch
import torch.multiprocessing as mp


def _serve(rank: int, world: int, rendezvous: str, connection: Any) -> None:
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.distributed.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=world)
    try:
        while (task := connection.recv()) is not None:
            function, args = task
            try:
                connection.send((True, function(*args)))
            except BaseException:
                connection.send((False, traceback.format_exc()))
    finally:
        torch.distributed.destroy_process_group()


class Workers:
    """``run(f, *args)`` calls f in every process and returns the results by rank."""

    def __init__(self, world: int, directory: str):
        context = mp.get_context("spawn")
        rendezvous = f"file://{directory}/rendezvous{world}"
        self.connections, self.processes = [], []
        for rank in range(world):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, world, rendezvous, theirs), daemon=True)
            process.start()
            theirs.close()
            self.connections.append(ours)
            self.processes.append(process)

    def run(self, function: Callable, *args: Any) -> list[Any]:
        for connection in self.connections:
            connection.send((function, args))
        answers = [
            connection.recv() if connection.poll(60) else (False, "no answer") for connection in self.connections
        ]
        failures = [text for ok, text in answers if not ok]
        assert not failures, "\n".join(failures)
        return [value for _, value in answers]

    def close(self) -> None:
        for connection in self.connections:
            connection.send(None)
        for process in self.processes:
            process.join(20)
            if process.is_alive():
                process.kill()
