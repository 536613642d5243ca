from __future__ import annotations

import signal
import threading
import time
from types import SimpleNamespace
from typing import Any

import pytest
from accelerate.data_loader import prepare_data_loader, skip_first_batches
from torch.utils.data import DataLoader, RandomSampler
from transformers import TrainerControl

from bfpo.core.errors import StopRequest
from bfpo.core.progress import TrainingProgress
from bfpo.data.streams import TwoStreamDataset
from bfpo.training.callbacks import InterruptCallback, ProgressFile, set_epoch_everywhere
from tiny import tiny_pairs


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("skipped", [0, 2])
def test_the_epoch_reaches_data_set_and_sampler(processes: int, skipped: int) -> None:
    """With two processes accelerate tells the sampler and not the data set; after skipping, neither."""
    dataset = TwoStreamDataset(tiny_pairs(16), tiny_pairs(5))

    def first_batch(epoch: int) -> list[int]:
        loader: Any = prepare_data_loader(
            DataLoader(dataset, batch_size=2, sampler=RandomSampler(dataset), collate_fn=list),
            num_processes=processes,
            process_index=0,
            put_on_device=False,
            use_seedable_sampler=True,
            data_seed=1,
        )
        if skipped:
            loader = skip_first_batches(loader, skipped)
        set_epoch_everywhere(loader, epoch)
        return [int(index) for index in next(iter(loader.batch_sampler))]

    orders = [first_batch(epoch) for epoch in (0, 1, 1)]
    assert orders[1] == orders[2]
    assert orders[0] != orders[1]
    assert dataset.epoch == 1


def stopping(callback: InterruptCallback) -> bool:
    control = TrainerControl()
    args, state = SimpleNamespace(world_size=1), SimpleNamespace(is_world_process_zero=True, global_step=3)
    callback.on_step_end(args, state, control)  # type: ignore[arg-type]
    return control.should_training_stop and control.should_save


@pytest.mark.parametrize(("number", "kind"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, StopRequest)])
def test_the_first_signal_waits_for_the_step_and_the_second_does_not(number: int, kind: type[BaseException]) -> None:
    class AtOnceError(Exception):
        pass

    def at_once(*_: object) -> None:
        raise AtOnceError

    before = signal.signal(number, at_once)
    try:
        with InterruptCallback() as callback:
            assert not stopping(callback)
            callback.raise_if_requested()
            signal.raise_signal(number)
            assert stopping(callback)
            with pytest.raises(AtOnceError):
                signal.raise_signal(number)
        assert signal.getsignal(number) == at_once
        with pytest.raises(KeyboardInterrupt) as raised:
            callback.raise_if_requested()
        assert raised.type is kind
    finally:
        signal.signal(number, before)


def test_a_signal_that_a_launcher_passes_on_again_is_the_same_request(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with InterruptCallback(same_within=0.2) as callback:
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)
            time.sleep(0.2)
            assert callback.requested == signal.SIGINT
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)


def test_an_ignored_signal_stays_ignored() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with InterruptCallback() as callback:
            signal.raise_signal(signal.SIGINT)
            assert not callback.requested
    finally:
        signal.signal(signal.SIGINT, before)


def test_other_threads_are_left_alone() -> None:
    before = signal.getsignal(signal.SIGINT)

    def enter() -> None:
        with InterruptCallback():
            assert signal.getsignal(signal.SIGINT) == before

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert signal.getsignal(signal.SIGINT) == before


def test_the_time_left_is_that_of_the_steps_since_the_process_started(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = SimpleNamespace(now=100.0)
    monkeypatch.setattr("bfpo.training.callbacks.time.monotonic", lambda: clock.now)
    written: list[TrainingProgress] = []
    callback = ProgressFile(written.append, seconds_between=5.0)
    state: Any = SimpleNamespace(global_step=40, max_steps=100, is_world_process_zero=True)
    arguments: Any = (None, state, TrainerControl())
    callback.on_train_begin(*arguments)  # resumed at step 40
    for now, step in ((104.0, 42), (108.0, 44), (110.0, 45)):
        clock.now, state.global_step = now, step
        callback.on_step_end(*arguments)
    assert [(one.step, one.max_steps, one.seconds_left) for one in written] == [(42, 100, 116.0), (45, 100, 110.0)]
    assert written[0].updated.endswith(" UTC")
    state.is_world_process_zero = False
    clock.now = 200.0
    callback.on_step_end(*arguments)
    assert len(written) == 2
