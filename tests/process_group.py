"""Two ranks on the CPU that stay alive for a whole session: starting them costs seconds, a task next to nothing."""

from __future__ import annotations

import multiprocessing
import os
import queue
import traceback
from collections.abc import Callable
from typing import Any

import torch
from builders import PATIENCE
from torch.distributed import TCPStore


def _serve(rank: int, size: int, port: int, tasks: Any, answers: Any) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE=str(size))
    torch.set_num_threads(1)
    store = TCPStore("127.0.0.1", port, is_master=False)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=size)
    while (task := tasks.get()) is not None:
        function, arguments = task
        try:
            answers.put((rank, function(*arguments), None))
        except BaseException:
            answers.put((rank, None, traceback.format_exc()))
    torch.distributed.destroy_process_group()


class ProcessGroup:
    """`process_group(function, *arguments)` calls a function of a test module on every rank; its results by rank."""

    def __init__(self, size: int = 2) -> None:
        context = multiprocessing.get_context("spawn")
        # The parent holds the store, on a port that the system gives it: no other process can take it meanwhile.
        self.store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        self.size = size
        self.tasks = [context.Queue() for _ in range(size)]
        self.answers = context.Queue()
        self.processes = [
            context.Process(target=_serve, args=(rank, size, self.store.port, self.tasks[rank], self.answers))
            for rank in range(size)
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
                rank, result, error = self.answers.get(timeout=PATIENCE)
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
            process.join(10)
            if process.is_alive():
                process.kill()
                process.join()
