"""Requests that come at the same time share a pass over the devices."""

import asyncio
import concurrent.futures
import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Any

import prometheus_client


class OverloadedError(Exception):
  """More requests are waiting than the server wants to keep."""


@dataclasses.dataclass
class _Item:
  value: Any
  future: asyncio.Future
  emit: Callable[[Any], None] | None
  since: float


class Batcher:
  """Collects values for a moment and gives them to a function as one batch.

  The first value of a batch waits `wait_ms` for others, at most; while a batch is being worked on,
  the next one collects.

  Args:
    work: (values, emits) -> results, in order; an exception in place of a result is raised for that
      value alone. It runs in `executor`; each emit sends something to its caller before the result
      is there.
    executor: one thread, shared by all who use the devices.
    size: values a batch.
    wait_ms: see above.
    waiting: values that may wait before `submit` refuses more.
    sizes: records the batches' sizes.
    delays: records how long values waited, in seconds.
  """

  def __init__(
    self,
    work: Callable[[Sequence[Any], Sequence[Any]], Sequence[Any]],
    executor: concurrent.futures.Executor,
    *,
    size: int,
    wait_ms: float,
    waiting: int,
    sizes: prometheus_client.Histogram,
    delays: prometheus_client.Histogram,
  ):
    self._work, self._executor, self._size, self._wait, self._waiting = (
      work,
      executor,
      size,
      wait_ms / 1e3,
      waiting,
    )
    self._queue: asyncio.Queue[_Item] = asyncio.Queue()
    self._sizes, self._delays = sizes, delays
    self._task: asyncio.Task | None = None

  def start(self) -> None:
    """Call it in the running loop."""
    self._task = asyncio.create_task(self._serve())

  async def stop(self) -> None:
    """What waits is still worked on."""
    await self._queue.join()
    self._task.cancel()

  async def submit(self, value: Any, emit: Callable[[Any], None] | None = None) -> Any:
    """The result for a value.

    Args:
      value: for `work`.
      emit: called in the loop's thread with whatever `work` emits for this value.

    Raises:
      OverloadedError: too many are waiting.
      Exception: what `work` raised.
    """
    if self._queue.qsize() >= self._waiting:
      raise OverloadedError(f"{self._queue.qsize()} requests are waiting")
    item = _Item(value, asyncio.get_running_loop().create_future(), emit, time.monotonic())
    self._queue.put_nowait(item)
    return await item.future

  async def _collect(self) -> list[_Item]:
    items = [await self._queue.get()]
    end = time.monotonic() + self._wait
    while len(items) < self._size:
      try:
        left = end - time.monotonic()
        items.append(
          self._queue.get_nowait() if left <= 0 else await asyncio.wait_for(self._queue.get(), left)
        )
      except (asyncio.QueueEmpty, TimeoutError):
        break
    return items

  async def _serve(self) -> None:
    loop = asyncio.get_running_loop()
    while True:
      items = await self._collect()
      live = [i for i in items if not i.future.done()]  # others have given up
      if live:
        self._sizes.observe(len(live))
        for item in live:
          self._delays.observe(time.monotonic() - item.since)
        emits = [_in_loop(loop, i.emit) for i in live]
        try:
          results = await loop.run_in_executor(
            self._executor, self._work, [i.value for i in live], emits
          )
        except Exception as error:
          results = [error] * len(live)
        for item, result in zip(live, results, strict=True):
          if item.future.done():
            continue
          if isinstance(result, Exception):
            item.future.set_exception(result)
          else:
            item.future.set_result(result)
      for _ in items:
        self._queue.task_done()


def _in_loop(
  loop: asyncio.AbstractEventLoop, emit: Callable[[Any], None] | None
) -> Callable[[Any], None] | None:
  return None if emit is None else lambda value: loop.call_soon_threadsafe(emit, value)
