"""A pytest plugin under which vLLM's own tests of its scheduler drive KVortex; `test_vllms_own.py` runs them.

Where a test makes a scheduler, KVortex is its connector: in place of none, or of those that vLLM's tests use. A test
plays the workers of a step, and knows nothing of jobs; `Worker` does them, with contents in place of bytes, and checks
that each request runs on its own KV. Where a test says how many tokens its connector finds, KVortex's pool is made to
hold as many, and KVortex finds them. Where it says that a load has ended, or which device blocks it has not filled,
that is what becomes of KVortex's load.

`VLLMS_OWN_REPORTS` names a file that gets a line of JSON for each test.
"""

import dataclasses
import importlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
from vllm.config import KVTransferConfig, ModelConfig, VllmConfig
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request
from vllms_own_worker import Answer, TestedConnector, Told, Worker

OPTIONS = {
    "pool": {"bytes": 16 << 20, "pin_piece_bytes": 16 << 20},
    "pending_wait_s": 0,  # what a test schedules may not depend on the time
}
REPLACED = ("ExampleConnector", "MockKVConnector", "NixlConnector")
"""Connectors of vLLM's tests in whose place KVortex comes; those that test any other are left as they are."""
UTILITIES = "tests.v1.kv_connector.unit.utils"
"""vLLM's, with the `Mock` that its tests of failed loads have as a connector."""
WORKERS: list[Worker] = []
"""Of the schedulers that a test has made."""
TOLD: dict[int, Answer | None] = {}
"""By the identity of a configuration what the connector that was replaced would say."""


# -- what a test has its connector say -------------------------------------------------------------


def what_is_told(transfer: KVTransferConfig | None) -> Answer | None:
    """What a connector that is replaced would say of a request; None if it would find nothing."""
    if transfer is None or transfer.kv_connector == "ExampleConnector":
        return None
    return remote if transfer.kv_connector == "NixlConnector" else mock(**transfer.kv_connector_extra_config)


def mock(
    *, matched_tokens: int = 0, is_async: bool = False, num_defers_before_matching: int = 0, **ignored: Any
) -> Answer:
    """The same of each request, once it has been asked so many times."""
    asked: dict[str, int] = {}

    def told(request: Request, num_computed_tokens: int) -> Told:
        times = asked[request.request_id] = asked.get(request.request_id, 0) + 1
        return (None, False) if times <= num_defers_before_matching else (matched_tokens, is_async)

    return told


def remote(request: Request, num_computed_tokens: int) -> Told:
    """All of a prompt that another engine has computed."""
    is_remote = (request.kv_transfer_params or {}).get("do_remote_prefill", False)
    return request.num_prompt_tokens - num_computed_tokens if is_remote else 0, True


class Asked(Mock):
    """In place of a `Mock` of `get_num_new_matched_tokens`: KVortex is asked, and its pool holds what a test says."""

    def __call__(self, request: Request, num_computed_tokens: int) -> Told:
        return WORKERS[-1].connector.ask(super().__call__, request, num_computed_tokens)


def make_mock_connector() -> TestedConnector:
    """In place of the `Mock` that a test makes: the connector of the last scheduler, its calls counted."""
    connector = WORKERS[-1].connector
    # A side effect's answer comes before the one that a test sets.
    counted = {name: Mock(side_effect=getattr(connector, name)) for name in ("request_finished", "take_events")}
    groups = Mock(side_effect=connector.get_loaded_kv_cache_group_ids)
    vars(connector).update(counted, get_loaded_kv_cache_group_ids=groups, get_num_new_matched_tokens=Asked())
    return connector


# -- in place of vLLM's ----------------------------------------------------------------------------


def put_connector_into_configurations() -> None:
    initialise = VllmConfig.__init__

    def __init__(config: VllmConfig, *arguments: Any, **values: Any) -> None:
        transfer = values.get("kv_transfer_config")
        is_replaced = transfer is None or transfer.kv_connector in REPLACED
        if is_replaced:
            values["kv_transfer_config"] = KVTransferConfig(
                kv_connector=TestedConnector.__name__,
                kv_connector_module_path=TestedConnector.__module__,
                kv_role="kv_both",
                kv_connector_extra_config=OPTIONS,
            )
        initialise(config, *arguments, **values)
        if is_replaced:
            TOLD[id(config)] = what_is_told(transfer)

    VllmConfig.__init__ = __init__


def skip_unknown_models(hub: Path) -> None:
    """Skip a test when it asks for a model of which there is no configuration."""
    initialise = ModelConfig.__init__

    def __init__(config: ModelConfig, *arguments: Any, **values: Any) -> None:
        model = values.get("model", ModelConfig.model)
        if not (Path(model).exists() or (hub / f"models--{model.replace('/', '--')}").exists()):
            pytest.skip(model)
        initialise(config, *arguments, **values)

    ModelConfig.__init__ = __init__


def put_workers_beside_schedulers() -> None:
    initialise, schedule, update = Scheduler.__init__, Scheduler.schedule, Scheduler.update_from_output

    def __init__(self: Scheduler, *arguments: Any, **values: Any) -> None:
        initialise(self, *arguments, **values)
        if isinstance(self.connector, TestedConnector) and self.connector.is_active:
            self.connector.told = TOLD.get(id(self.vllm_config))
            self.connector.worker = Worker(self)
            WORKERS.append(self.connector.worker)

    def schedule_with_worker(self: Scheduler, *arguments: Any, **values: Any) -> SchedulerOutput:
        output = schedule(self, *arguments, **values)
        if (worker := worker_of(self)) is None:
            return output
        worker.scheduled(output)
        # A load that the test takes for instant costs a step; the test gets the one behind it.
        while worker.connector.instant and worker.is_alone and not output.num_scheduled_tokens:
            if not output.kv_connector_metadata.loads:
                break
            self.update_from_output(output, ModelRunnerOutput(req_ids=[], req_id_to_index={}, sampled_token_ids=[]))
            output = schedule(self, *arguments, **values)
            worker.scheduled(output)
        return output

    def update_with_worker(self: Scheduler, output: SchedulerOutput, runner: ModelRunnerOutput) -> Any:
        if (worker := worker_of(self)) is None:
            return update(self, output, runner)
        works = worker.begin(output)
        told = worker.tell(runner.kv_connector_output)
        answer = update(self, output, dataclasses.replace(runner, kv_connector_output=told))
        worker.finish(works, output, runner)
        return answer

    Scheduler.__init__ = __init__
    Scheduler.schedule = schedule_with_worker
    Scheduler.update_from_output = update_with_worker


def worker_of(scheduler: Scheduler) -> Worker | None:
    return getattr(scheduler.connector, "worker", None) if isinstance(scheduler.connector, TestedConnector) else None


# -- hooks -----------------------------------------------------------------------------------------


def pytest_configure() -> None:
    put_connector_into_configurations()
    skip_unknown_models(Path(os.environ["HF_HUB_CACHE"]))
    put_workers_beside_schedulers()
    vars(importlib.import_module(UTILITIES))["create_mock_connector"] = make_mock_connector


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    WORKERS.clear()
    TOLD.clear()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call() -> Iterator[None]:
    yield
    for worker in WORKERS:
        worker.check()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Any:
    report = yield
    if report.when == "call" or not report.passed:
        figures = {
            name: sum(getattr(worker, name) for worker in WORKERS)
            for name in ("num_steps", "num_saved", "num_loaded", "num_not_loaded", "num_checked")
        }
        line = {"test": item.nodeid, "outcome": report.outcome, "reason": "", "raised_in": "", **figures}
        if report.skipped:
            line["reason"] = report.longrepr[2].removeprefix("Skipped: ")
        elif report.failed:
            line |= {"reason": report.longreprtext[-4000:], "raised_in": str(call.excinfo.traceback[-1].path)}
        with Path(os.environ["VLLMS_OWN_REPORTS"]).open("a") as file:
            file.write(json.dumps(line) + "\n")
    if report.when == "teardown":
        for worker in WORKERS:
            worker.connector.shutdown()
    return report
