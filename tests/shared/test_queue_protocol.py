"""The queue protocol call by call: what a worker sees, what reaches the owner, who is refused."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator

import pytest
import redis

from shared.config import Settings
from shared.messages import Frame, GenerateRequest, RequestMeta, SamplingParams, TokenLogprob, WorkerStatus
from shared.queue import (
    Emission,
    InferenceClient,
    InferenceWorkerQueue,
    QueueFull,
    open_async_redis,
    open_redis,
)
from shared.queue.client import RequestTooLarge

numbers = itertools.count()


@pytest.fixture
def timers(redis_url: str) -> Settings:
    return Settings(
        redis_url=redis_url, lease_s=0.2, reap_s=0, beat_s=0.05, owner_no_progress_s=0.3, api_ttl_s=30
    )


@pytest.fixture
def server(redis_url: str) -> redis.Redis:
    return open_redis(redis_url)


@pytest.fixture
async def client(timers: Settings) -> AsyncIterator[InferenceClient]:
    async with InferenceClient(open_async_redis(timers.redis_url), timers, "api-1") as client:
        yield client


def make_worker(timers: Settings, name: str = "w1") -> InferenceWorkerQueue:
    return InferenceWorkerQueue(open_redis(timers.redis_url), timers, name)


def make_request(max_tokens: int = 4, **fields: object) -> GenerateRequest:
    rid = f"r{next(numbers)}"
    base = {"request_id": rid, "tenant_id": "t", "prompt": (1, 2, 3)}
    return GenerateRequest.model_validate(base | {"sampling": SamplingParams(max_tokens=max_tokens)} | fields)


async def collect(client: InferenceClient, request: GenerateRequest) -> list[Frame]:
    return [frame async for frame in client.stream(request)]


def tokens_of(frames: list[Frame]) -> list[int]:
    return [token for frame in frames for token in frame.tokens]


def num_entries(server: redis.Redis) -> int:
    return sum(server.xlen(f"fx:{{inf}}:q:{lane}") for lane in ("hi", "std", "batch"))


async def test_tokens_meta_and_finish_reach_the_owner_in_order(client, timers, server) -> None:
    request = make_request()
    await client.enqueue(request)
    worker = make_worker(timers)
    [claimed] = worker.take(4)
    assert claimed.request == request
    assert claimed.emitted_tokens == ()
    logprob = TokenLogprob(logprob=-1.25, top=((7, -1.25), (9, -2.5)))
    meta = RequestMeta(cached_tokens=2, prompt_logprobs=(None, logprob, logprob))
    assert worker.emit([Emission(claimed, 0, [7], logprobs=[logprob], meta=meta)]) == ["ok"]
    assert worker.emit([Emission(claimed, 1, [8, 9], finish="stop", logprobs=[logprob] * 2)]) == ["ok"]
    first, last = await collect(client, request)
    assert (first.tokens, first.meta, first.logprobs, first.finish) == ((7,), meta, (logprob,), None)
    assert (last.from_seq, last.tokens, last.finish) == (1, (8, 9), "stop")
    assert num_entries(server) == 0
    assert client.num_in_flight == 0


async def test_a_repeated_emit_changes_nothing(client, timers) -> None:
    """The worker died, or lost the reply, after the server had done it."""
    request = make_request()
    await client.enqueue(request)
    worker = make_worker(timers)
    [claimed] = worker.take(1)
    steps = [Emission(claimed, 0, [5, 6]), Emission(claimed, 2, [7], finish="stop")]
    assert [worker.emit([step]) for step in steps for _ in range(2)] == [["ok"]] * 4
    assert tokens_of(await collect(client, request)) == [5, 6, 7]


async def test_a_successor_continues_after_the_tokens_already_given(client, timers, server) -> None:
    request = make_request()
    await client.enqueue(request)
    dead, next_one = make_worker(timers, "dead"), make_worker(timers, "next")
    [claimed] = dead.take(1)
    dead.emit([Emission(claimed, 0, [5, 6])])
    assert next_one.take(1) == []
    lapse_leases(server)
    [resumed] = next_one.take(1)
    assert resumed.emitted_tokens == (5, 6)
    assert resumed.attempt == claimed.attempt + 1
    next_one.emit([Emission(resumed, 2, [7, 8], finish="length")])
    assert tokens_of(await collect(client, request)) == [5, 6, 7, 8]


async def test_a_zombie_with_an_old_fence_is_refused(client, timers, server) -> None:
    request = make_request()
    await client.enqueue(request)
    zombie, owner = make_worker(timers, "zombie"), make_worker(timers, "owner")
    [old] = zombie.take(1)
    lapse_leases(server)
    [new] = owner.take(1)
    assert zombie.beat([old], status("zombie")) == [request.request_id]
    assert zombie.emit([Emission(old, 0, [99], finish="stop")]) == ["stale"]
    zombie.release([old])
    assert owner.emit([Emission(new, 0, [1], finish="stop")]) == ["ok"]
    assert tokens_of(await collect(client, request)) == [1]


async def test_a_beat_keeps_the_lease(client, timers, server) -> None:
    await client.enqueue(make_request())
    worker, other = make_worker(timers), make_worker(timers, "other")
    [claimed] = worker.take(1)
    lapse_leases(server)
    assert worker.beat([claimed], status("w1")) == []
    assert other.take(1) == []


async def test_a_request_that_kills_every_worker_is_condemned_after_three(client, timers, server) -> None:
    request = make_request()
    await client.enqueue(request)
    for i in range(3):
        assert len(make_worker(timers, f"victim-{i}").take(1)) == 1
        lapse_leases(server)
    assert make_worker(timers, "careful").take(1) == []
    [frame] = await collect(client, request)
    assert (frame.finish, frame.error) == ("error", "poisoned")
    [(_, letter)] = server.xrange("fx:{inf}:dlq")
    assert (letter["rid"], letter["why"]) == (request.request_id, "poisoned")
    assert "payload" not in letter
    assert num_entries(server) == 0


async def test_a_request_that_makes_progress_is_never_condemned(client, timers, server) -> None:
    request = make_request(max_tokens=8)
    await client.enqueue(request)
    for i in range(7):
        worker = make_worker(timers, f"victim-{i}")
        [claimed] = worker.take(1)
        worker.emit([Emission(claimed, i, [i])])
        lapse_leases(server)
    worker = make_worker(timers)
    [claimed] = worker.take(1)
    worker.emit([Emission(claimed, 7, [7], finish="length")])
    assert tokens_of(await collect(client, request)) == list(range(8))


async def test_cancelling_a_queued_request_removes_it_at_once(client, timers, server) -> None:
    request = make_request()
    await client.enqueue(request)
    client.cancel(request.request_id)
    await settle(client)
    assert num_entries(server) == 0
    assert make_worker(timers).take(1) == []


async def test_cancelling_a_running_request_stops_it_at_the_next_emit(client, timers, server) -> None:
    requests = [make_request(), make_request()]
    for request in requests:
        await client.enqueue(request)
    worker = make_worker(timers)
    first, second = worker.take(2)
    client.cancel(first.request_id)
    await settle(client)
    assert worker.emit([Emission(first, 0), Emission(second, 0, [1])]) == ["cancel", "ok"]
    assert worker.emit([Emission(first, 0, [1])]) == ["stale"]
    client.cancel(second.request_id)
    await settle(client)
    assert worker.beat([second], status("w1")) == [second.request_id]
    assert num_entries(server) == 0


async def test_leaving_a_stream_early_cancels_its_request(client, timers, server) -> None:
    request = make_request()
    await client.enqueue(request)
    worker = make_worker(timers)
    [claimed] = worker.take(1)
    worker.emit([Emission(claimed, 0, [1])])
    stream = client.stream(request)
    assert (await anext(stream)).tokens == (1,)
    await stream.aclose()
    await settle(client)
    assert worker.emit([Emission(claimed, 1, [2])]) == ["cancel"]


async def test_a_worker_ahead_of_a_cut_log_is_told_where_to_go_on(client, timers, server) -> None:
    request = make_request()
    await client.enqueue(request)
    worker = make_worker(timers)
    [claimed] = worker.take(1)
    worker.emit([Emission(claimed, 0, [1, 2, 3])])
    server.ltrim(f"fx:{{inf}}:tok:{request.request_id}", 0, 0)  # the tail was lost with the machine's power
    assert worker.emit([Emission(claimed, 3, [4])]) == ["behind:1"]
    assert worker.emit([Emission(claimed, 1, [2, 3, 4], finish="length")]) == ["ok"]
    assert tokens_of(await collect(client, request)) == [1, 2, 3, 4]


async def test_a_lost_frame_is_read_from_the_log(client, timers, server) -> None:
    request = make_request()
    await client.enqueue(request)
    worker = make_worker(timers)
    [claimed] = worker.take(1)
    logprobs = [TokenLogprob(logprob=-float(i)) for i in range(4)]
    stream = client.stream(request)
    worker.emit([Emission(claimed, 0, [1], logprobs=logprobs[:1])])
    frames = [await anext(stream)]
    client._last_id = "9999999999999-0"  # the reader sees nothing any more
    await settle(client)
    worker.emit([Emission(claimed, 1, [2, 3], logprobs=logprobs[1:3], meta=RequestMeta(cached_tokens=1))])
    worker.emit([Emission(claimed, 3, [4], finish="length", logprobs=logprobs[3:])])
    frames += [frame async for frame in stream]
    assert tokens_of(frames) == [1, 2, 3, 4]
    assert [lp for frame in frames for lp in frame.logprobs or ()] == logprobs
    assert [frame.meta for frame in frames if frame.meta] == [RequestMeta(cached_tokens=1)]


async def test_a_slow_reader_is_caught_up_from_the_log(client, timers) -> None:
    request = make_request(max_tokens=200)
    await client.enqueue(request)
    worker = make_worker(timers)
    [claimed] = worker.take(1)
    for i in range(200):
        worker.emit([Emission(claimed, i, [i], finish="length" if i == 199 else None)])
    assert tokens_of(await collect(client, request)) == list(range(200))


async def test_an_emptied_redis_heals_without_repeating_a_token(client, timers, server) -> None:
    request = make_request()
    await client.enqueue(request)
    worker = make_worker(timers)
    [claimed] = worker.take(1)
    worker.emit([Emission(claimed, 0, [1, 2])])
    stream = client.stream(request)
    frames = [await anext(stream)]
    server.flushall()
    assert worker.emit([Emission(claimed, 2, [3])]) == ["stale"]
    assert worker.take(1) == []
    more = anext(stream)
    task = asyncio.ensure_future(more)
    resumed = await eventually_take(worker)
    assert resumed.emitted_tokens == (1, 2)
    worker.emit([Emission(resumed, 2, [3, 4], finish="length")])
    frames += [await task] + [frame async for frame in stream]
    assert tokens_of(frames) == [1, 2, 3, 4]


async def test_another_continuation_never_joins_tokens_already_given(client, timers, server) -> None:
    """Power loss cut the log, the worker died too, and its successor sampled other tokens."""
    request = make_request()
    await client.enqueue(request)
    worker = make_worker(timers)
    [claimed] = worker.take(1)
    worker.emit([Emission(claimed, 0, [1, 2, 3])])
    stream = client.stream(request)
    frames = [await anext(stream)]
    server.ltrim(f"fx:{{inf}}:tok:{request.request_id}", 0, 0)
    lapse_leases(server)
    other = make_worker(timers, "other")
    [resumed] = other.take(1)
    other.emit([Emission(resumed, 1, [77])])
    other.emit([Emission(resumed, 2, [78, 79], finish="length")])
    task = asyncio.ensure_future(anext(stream))
    again = await eventually_take(other)
    assert again.emitted_tokens == (1, 2, 3)
    assert other.emit([Emission(resumed, 2, [78])]) == ["stale"]
    other.emit([Emission(again, 3, [4], finish="length")])
    frames += [await task] + [frame async for frame in stream]
    assert tokens_of(frames) == [1, 2, 3, 4]


async def test_an_entry_that_no_worker_will_see_is_put_back(client, timers, server) -> None:
    request = make_request()
    await client.enqueue(request)
    eid = server.hget(f"fx:{{inf}}:req:{request.request_id}", "eid")
    server.xgroup_setid("fx:{inf}:q:std", "w", eid)  # delivered, says the group, and yet pending nowhere
    worker = make_worker(timers)
    assert worker.take(1) == []
    task = asyncio.ensure_future(collect(client, request))
    claimed = await eventually_take(worker)
    worker.emit([Emission(claimed, 0, [1], finish="stop")])
    assert tokens_of(await task) == [1]


async def test_enqueueing_twice_makes_one_entry(client, timers, server) -> None:
    request = make_request()
    await client.enqueue(request)
    await client.enqueue(request)
    assert num_entries(server) == 1
    assert len(make_worker(timers).take(4)) == 1


async def test_a_doubled_entry_is_delivered_once(client, timers, server) -> None:
    request = make_request()
    await client.enqueue(request)
    server.xadd("fx:{inf}:q:std", {"rid": request.request_id})
    worker = make_worker(timers)
    assert len(worker.take(4)) == 1
    assert num_entries(server) == 1


async def test_a_drained_worker_hands_over_at_once_and_nothing_counts_against_the_request(
    client, timers, server
) -> None:
    request = make_request()
    await client.enqueue(request)
    for i in range(4):
        worker = make_worker(timers, f"w{i}")
        [claimed] = worker.take(1)
        worker.release([claimed])
        worker.retire()
    worker = make_worker(timers, "last")
    [claimed] = worker.take(1)
    worker.emit([Emission(claimed, 0, [1], finish="stop")])
    assert tokens_of(await collect(client, request)) == [1]
    consumers = {c["name"] for c in server.xinfo_consumers("fx:{inf}:q:hi", "w")}
    assert consumers == {"last"}


async def test_a_full_lane_refuses_and_leaves_nothing_behind(timers, server) -> None:
    small = timers.model_copy(update={"max_queue_depth": 2})
    async with InferenceClient(open_async_redis(small.redis_url), small, "api-1") as client:
        for _ in range(2):
            await client.enqueue(make_request())
        with pytest.raises(QueueFull):
            await client.enqueue(make_request())
        await client.enqueue(make_request(service_tier="priority"))
        assert client.num_in_flight == 3
    assert num_entries(server) == 3


async def test_a_request_above_the_bound_is_refused(client, server) -> None:
    with pytest.raises(RequestTooLarge):
        await client.enqueue(make_request(prompt=tuple(range(200_000))))
    assert num_entries(server) == 0


async def test_lanes_are_served_by_rank_and_none_starves(client, timers) -> None:
    for tier in ("flex", "default", "priority"):
        for _ in range(12):
            await client.enqueue(make_request(service_tier=tier))
    worker = make_worker(timers)
    tiers = [claimed.request.service_tier for _ in range(20) for claimed in worker.take(1)]
    assert tiers[:4] == ["priority"] * 4
    assert tiers[:10].count("flex") == 1
    assert tiers.index("default") < tiers.index("flex")


async def test_a_request_that_waited_too_long_is_told_so(timers, server) -> None:
    hasty = timers.model_copy(update={"queue_wait_s": 0.0})
    async with InferenceClient(open_async_redis(hasty.redis_url), hasty, "api-1") as client:
        request = make_request()
        await client.enqueue(request)
        [frame] = await collect(client, request)
    assert (frame.finish, frame.error) == ("error", "queue_timeout")
    assert num_entries(server) == 0


async def test_a_worker_learns_how_long_a_request_has_waited_whoever_had_it_before(client, timers) -> None:
    await client.enqueue(make_request())
    await asyncio.sleep(0.05)
    first = make_worker(timers, "first")
    [claimed] = first.take(1)
    assert 0.05 <= claimed.waited_s < 5.0
    await asyncio.sleep(0.05)
    first.release([claimed])
    [again] = make_worker(timers, "second").take(1)
    assert again.waited_s >= claimed.waited_s + 0.05


async def test_a_request_past_its_deadline_is_stopped(client, timers) -> None:
    request = make_request(deadline_s=0.05)
    await client.enqueue(request)
    worker = make_worker(timers)
    [claimed] = worker.take(1)
    await settle(client)
    assert worker.emit([Emission(claimed, 0, [1])]) == ["cancel"]
    [frame] = await collect(client, request)
    assert (frame.finish, frame.error) == ("error", "deadline_exceeded")


async def test_requests_of_a_dead_api_process_are_dropped(timers, server) -> None:
    client = InferenceClient(open_async_redis(timers.redis_url), timers, "api-dead")
    running, queued = make_request(), make_request()
    await client.enqueue(running)
    await client.enqueue(queued)
    worker = make_worker(timers)
    [claimed] = worker.take(1)
    server.delete("fx:{inf}:api:api-dead")
    assert worker.beat([claimed], status("w1")) == [running.request_id]
    assert worker.take(4) == []
    assert num_entries(server) == 0


async def test_a_payload_that_cannot_be_read_fails_alone(client, timers, server) -> None:
    bad, good = make_request(), make_request()
    await client.enqueue(bad)
    await client.enqueue(good)
    server.hset(f"fx:{{inf}}:req:{bad.request_id}", "payload", '{"prompt": []}')
    [claimed] = make_worker(timers).take(4)
    assert claimed.request == good
    [frame] = await collect(client, bad)
    assert (frame.finish, frame.error) == ("error", "bad_payload")


async def test_waiting_ends_when_a_request_arrives(client, timers) -> None:
    worker = make_worker(timers)
    assert worker.take(1) == []
    assert worker.wait(0.01) is False
    await client.enqueue(make_request())
    assert worker.wait(1.0) is True


async def test_live_workers_are_seen_with_the_age_of_their_progress(client, timers) -> None:
    worker = make_worker(timers)
    worker.beat([], status("w1").model_copy(update={"progress_age_s": 2.0, "free_blocks": 7}))
    [seen] = await client.workers()
    assert (seen.worker_id, seen.free_blocks) == ("w1", 7)
    assert 2.0 <= seen.progress_age_s < 5.0
    worker.retire()
    assert await client.workers() == []


async def test_an_unusable_request_id_is_refused(client) -> None:
    with pytest.raises(ValueError, match="request id"):
        await client.enqueue(make_request(request_id='x"\n'))


def status(worker_id: str) -> WorkerStatus:
    return WorkerStatus(worker_id=worker_id)


def lapse_leases(server: redis.Redis) -> None:
    """As if the lease had passed since the last sign of life."""
    for lane in ("hi", "std", "batch"):
        key = f"fx:{{inf}}:q:{lane}"
        if not server.exists(key):
            continue
        for entry in server.xpending_range(key, "w", "-", "+", 100):
            server.xclaim(key, "w", entry["consumer"], 0, [entry["message_id"]], idle=60_000, justid=True)


async def settle(client: InferenceClient) -> None:
    await asyncio.sleep(0.1)


async def eventually_take(worker: InferenceWorkerQueue) -> object:
    for _ in range(200):
        if claims := worker.take(1):
            return claims[0]
        await asyncio.sleep(0.02)
    raise AssertionError("the request never came back")
