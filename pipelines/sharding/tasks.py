"""Work that needs no decoder, on whatever nodes there are: a function, and what it is asked for one after the other."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

from hbi.pipelines.sharding.shards import ShardError

RETRIES = 20
"""How often a task is begun again whose node is lost."""
AHEAD = 2
"""Tasks under way for each CPU: what they return waits for its turn."""

Item = TypeVar("Item")
Result = TypeVar("Result")


def on_tasks(work: Callable[[Item], Result], items: Iterable[Item], spread: bool) -> Iterator[Result]:
    """What `work` returns of each of `items`, in their order: by tasks of Ray, or here where not `spread`.

    work may be called twice of an item, and so writes the same again. Raises what it raises; ShardError where Ray
    fails.
    """
    if not spread:
        yield from map(work, items)
        return
    import ray
    from ray.exceptions import RayError, RayTaskError

    task: Any = ray.remote(_call).options(num_cpus=1, max_retries=RETRIES)
    shared = ray.put(work)
    waiting: deque[Any] = deque()
    most = AHEAD * max(4, int(ray.cluster_resources().get("CPU", 1)))
    try:
        for item in items:
            waiting.append(task.remote(shared, item))
            if len(waiting) == most:
                yield ray.get(waiting.popleft())
        while waiting:
            yield ray.get(waiting.popleft())
    except RayTaskError as error:
        raise error.cause from None  # pyright: ignore[reportGeneralTypeIssues]
    except RayError as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ShardError(f"Ray lost a task for good ({reason}): run again to go on") from error
    finally:
        for reference in waiting:
            ray.cancel(reference)


def _call(work: Callable[[Any], Any], item: Any) -> Any:
    return work(item)
