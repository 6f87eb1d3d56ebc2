"""Who is next: clients take turns, and each client's requests are served as they come."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator

from mlx_kimi.server.job import Job


class Turns:
    """Jobs whose prompts are not read yet."""

    def __init__(self) -> None:
        self._clients: OrderedDict[str, list[Job]] = OrderedDict()  # whose turn is next first

    def __iter__(self) -> Iterator[Job]:
        return iter([job for jobs in self._clients.values() for job in jobs])

    def __len__(self) -> int:
        return sum(len(jobs) for jobs in self._clients.values())

    def __contains__(self, job: object) -> bool:
        return any(job is each for jobs in self._clients.values() for each in jobs)

    def add(self, job: Job) -> None:
        """At the end of its client's jobs."""
        self._clients.setdefault(job.ticket.request.client, []).append(job)

    def remove(self, job: Job) -> None:
        """Its prompt is read, or nobody wants it any more."""
        client = job.ticket.request.client
        self._clients[client].remove(job)
        if not self._clients[client]:
            del self._clients[client]

    def next(self, may_run: Callable[[Job], bool]) -> Job | None:
        """The first job that may run, of the client whose turn it is, which is then the last."""
        for client, jobs in self._clients.items():
            for job in jobs:
                if may_run(job):
                    self._clients.move_to_end(client)
                    return job
        return None
