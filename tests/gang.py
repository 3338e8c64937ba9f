"""Two ranks on the CPU that stay alive for a whole test file: starting them costs seconds, a task next to nothing."""

from __future__ import annotations

import multiprocessing
import os
import queue
import socket
import traceback
from collections.abc import Callable
from typing import Any

import torch


def _serve(rank: int, size: int, port: int, tasks: Any, answers: Any) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE=str(size))
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")
    while (task := tasks.get()) is not None:
        function, arguments = task
        try:
            answers.put((rank, function(*arguments), None))
        except BaseException:
            answers.put((rank, None, traceback.format_exc()))
    torch.distributed.destroy_process_group()


class Gang:
    """`gang(function, *arguments)` calls a function of a test module on every rank and returns the results in order."""

    def __init__(self, size: int = 2) -> None:
        context = multiprocessing.get_context("spawn")
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.size = size
        self.tasks = [context.Queue() for _ in range(size)]
        self.answers = context.Queue()
        self.processes = [
            context.Process(target=_serve, args=(r, size, port, self.tasks[r], self.answers)) for r in range(size)
        ]
        for process in self.processes:
            process.start()

    def __call__(self, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        for tasks in self.tasks:
            tasks.put((function, arguments))
        results: dict[int, Any] = {}
        errors = []
        try:
            for _ in range(self.size):
                rank, result, error = self.answers.get(timeout=60)
                results[rank] = result
                errors += [f"rank {rank}:\n{error}"] * (error is not None)
        except queue.Empty:
            self.close()
            raise AssertionError(f"only ranks {sorted(results)} answered: the others hang. {errors}") from None
        assert not errors, "\n".join(errors)
        return [results[rank] for rank in range(self.size)]

    def close(self) -> None:
        for tasks in self.tasks:
            tasks.put(None)
        for process in self.processes:
            process.join(5)
            if process.is_alive():
                process.kill()
                process.join()
