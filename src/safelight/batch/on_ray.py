"""Draw rows with many workers: Ray Data's actors, each of which holds the model.

Ray distributes rows and restarts workers. Our own index says what is done: docs/decisions/0053 says
why Ray's checkpoints are not used. Only this process writes, so workers need no shared folder.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import sys
import traceback
import warnings
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any

from safelight.batch.check import Row
from safelight.batch.output import Outcome
from safelight.batch.worklist import WorkList
from safelight.errors import SafelightError
from safelight.ray_cluster import HERE, connect

if TYPE_CHECKING:
    from safelight.batch.drawing import Drawer
    from safelight.batch.run import How

SEGMENT = 5_000
"""Rows given to Ray at once. Between two such segments workers start anew, which takes seconds."""

TRIES = 5
"""Further tries of a task whose worker died. After them each of its rows becomes a task of its own,
with as many tries; if its workers die, too, the row has failed.
"""


@dataclass(frozen=True)
class Cluster:
    """The workers of a batch.

    address: of a Ray cluster; "local" starts one on this machine. workers: None is one for each
    GPU, or, without GPUs, one for each node. gpus: of each worker, may be a fraction; None is 1 if
    there are some. rows: of a task; all of them are drawn again if its worker dies.
    """

    address: str = HERE
    workers: int | None = None
    gpus: float | None = None
    rows: int = 8

    def draw(self, work: WorkList, how: How, tell: Callable[[str], object]) -> Generator[Outcome]:
        """Yield the outcome of each row of a list, in the order in which they finish."""
        ray = _start(self.address)
        try:
            crew = self._crew(ray, how)
            tell(f"{crew.size} workers on {crew.nodes} nodes, {crew.told}")
            how = dataclasses.replace(how, threads=crew.threads)
            models = work.models()
            crew = dataclasses.replace(crew, spares=len(models) > 1)
            for model, _ in models:
                rows = work.rows(model)
                while segment := list(islice(rows, SEGMENT)):
                    yield from crew.draw_all(model, how, segment, self.rows)
        finally:
            ray.shutdown()

    def _crew(self, ray: Any, how: How) -> _Crew:
        has = ray.cluster_resources()
        nodes = sum(node["Alive"] for node in ray.nodes())
        cpus, there = int(has.get("CPU", 0)), has.get("GPU", 0)
        wants_gpu = how.loading.get("device", "auto").startswith(("auto", "cuda"))
        gpus = self.gpus if self.gpus is not None else float(bool(there) and wants_gpu)
        size = self.workers or (max(1, int(there / gpus)) if gpus else nodes)
        # A worker on a CPU uses all threads that it may; each has the same number, for exact mode.
        threads = how.threads or (1 if gpus else max(1, cpus // size))
        if threads * size > cpus or gpus * size > there + 1e-9:
            each = f"{threads} threads" + (f" and {gpus:g} GPUs" if gpus else "")
            raise SafelightError(
                f"{size} workers with {each} each need more than the {cpus} CPUs and {there:g} "
                "GPUs of the cluster: ask for fewer --workers, --threads or --gpus"
            )
        return _Crew(size, nodes, threads, gpus)


@dataclass(frozen=True)
class _Crew:
    """The workers as planned. spares: whether other models go on if one cannot be loaded."""

    size: int
    nodes: int
    threads: int
    gpus: float
    spares: bool = False

    @property
    def told(self) -> str:
        return f"each with {self.gpus:g} GPU" if self.gpus else f"each with {self.threads} threads"

    def draw_all(self, model: str, how: How, rows: list[Row], at_once: int) -> Iterator[Outcome]:
        """Yield the outcomes of rows. A row whose workers die again and again fails."""
        left = {row.id: row for row in rows}
        for each in dict.fromkeys((at_once, 1)):
            if not left:
                return
            for outcome in self._draw(model, how, list(left.values()), each):
                if left.pop(outcome.row_id, None) is not None:
                    yield outcome
        for row in left.values():
            told = f"workers died {TRIES + 1} times while they drew it: memory may be too small"
            yield Outcome(row.id, row.name, {"line": row.line}, error=("worker_died", told))

    def _draw(self, model: str, how: How, rows: list[Row], each: int) -> Iterator[Outcome]:
        import pyarrow as pa
        import ray
        from ray.util.annotations import RayDeprecationWarning

        texts = [json.dumps(dataclasses.asdict(row)) for row in rows]
        tables = [pa.table({"row": texts[i : i + each]}) for i in range(0, len(texts), each)]
        with warnings.catch_warnings():
            # From Ray 2.64 on, max_task_retries must be given in another way: pyproject.toml.
            warnings.simplefilter("ignore", RayDeprecationWarning)
            drawn = ray.data.from_arrow(tables).map_batches(
                DrawingActor,
                fn_constructor_args=(model, how, self.spares),
                batch_format="pyarrow",
                batch_size=None,
                compute=ray.data.ActorPoolStrategy(size=self.size),
                num_cpus=self.threads,
                num_gpus=self.gpus or None,
                max_task_retries=TRIES,
            )
        for batch in drawn.iter_batches(batch_size=None, batch_format="pyarrow"):
            for told, pictures in zip(batch["outcome"], batch["pictures"], strict=True):
                outcome = Outcome(**json.loads(told.as_py()), pictures=pictures.as_py())
                code, message = outcome.error or ("", "")
                if code == _FATAL:
                    raise SafelightError(message)
                if code == _FAULT:
                    raise RuntimeError(f"a worker met a fault of Safelight\n{message}")
                yield outcome


_FATAL, _FAULT = "fatal", "fault"
"""Codes of what ends the batch: an error in one line, and a fault of the program, as a traceback.
Ray would leave out the rows of a task that raises, as if its worker had died.
"""


class DrawingActor:
    """A worker, in Ray Data's form: it takes a table of rows and yields tables of outcomes."""

    def __init__(self, model: str, how: How, spares: bool = False) -> None:
        self._model, self._how, self._spares = model, how, spares
        self._drawer: Drawer | None = None

    def __call__(self, table: Any) -> Iterator[Any]:
        """Yield the outcome of each row, with its pictures, as a table."""
        try:
            yield from self._outcomes(table)
        except SafelightError as error:  # every other row would fail by it, too
            yield as_table(Outcome("", "", error=(_FATAL, str(error))))
        except Exception as error:
            told = "".join(traceback.format_exception(error))
            yield as_table(Outcome("", "", error=(_FAULT, told)))

    def _outcomes(self, table: Any) -> Iterator[Any]:
        from safelight.batch.drawing import Drawer, failed

        rows = [Row(**json.loads(text)) for text in table["row"].to_pylist()]
        if self._drawer is None:
            try:
                self._drawer = Drawer(self._model, self._how, tell=sys.stderr.write)
            except SafelightError as error:
                if not self._spares:
                    raise
                yield from (as_table(failed(row, error)) for row in rows)
                return
        yield from map(as_table, self._drawer.draw(rows))


def as_table(outcome: Outcome) -> Any:
    """Return an outcome as a table of one row."""
    import pyarrow as pa

    told = {name: value for name, value in vars(outcome).items() if name != "pictures"}
    pictures = pa.array([outcome.pictures], pa.list_(pa.binary()))
    return pa.table({"outcome": [json.dumps(told, ensure_ascii=False)], "pictures": pictures})


def _start(address: str) -> Any:
    """Return the module ray, connected, with Ray Data's log quiet. Raises SafelightError."""
    ray = connect(address, "ray.data")
    # Ray Data reports each task whose worker died; we report only what is lost in the end.
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.max_errored_blocks = -1
    return ray
