"""The waiting queue and the deadline heap against plain lists."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from phalanx.controller.scheduling.queue import DeadlineHeap, WaitingQueue
from phalanx.controller.scheduling.request import Request
from phalanx.controller.scheduling.sample import Sample
from phalanx.protos.sampling import SamplingParams


def sample(order: int) -> Sample:
    request = Request(
        request_id=f"r{order}", prompt_token_ids=[1], params=SamplingParams(), arrival=0.0
    )
    return Sample.of(request, order, 10, ())


@given(
    st.lists(st.tuples(st.sampled_from(["append", "front", "remove", "replace"]), st.integers()))
)
def test_the_queue_is_a_list(actions: list[tuple[str, int]]) -> None:
    queue, model = WaitingQueue(), list[Sample]()
    for order, (action, where) in enumerate(actions):
        new = sample(order)
        if action == "append":
            queue.append(new)
            model.append(new)
        elif action == "front":
            queue.push_front(new)
            model.insert(0, new)
        elif model:
            index = where % len(model)
            if action == "remove":
                queue.remove(model.pop(index))
            else:
                queue.replace(model[index], new)
                model[index] = new
        assert list(queue) == model and len(queue) == len(model)
        if model:
            assert queue.head is model[0]


@given(st.lists(st.floats(0, 10)), st.floats(0, 10), st.floats(0, 10))
def test_the_heap_gives_what_is_due_in_order(
    deadlines: list[float], first: float, second: float
) -> None:
    heap = DeadlineHeap()
    for index, deadline in enumerate(deadlines):
        heap.push(deadline, ("r", index))
    popped = [deadlines[index] for _, index in heap.pop_due(first)]
    assert popped == sorted(deadline for deadline in deadlines if deadline <= first)
    heap.sweep((deadline, ("r", index)) for index, deadline in enumerate(deadlines))
    assert len(heap) == len(deadlines)
    again = [deadlines[index] for _, index in heap.pop_due(second)]
    assert again == sorted(deadline for deadline in deadlines if deadline <= second)
