from __future__ import annotations

import signal
import threading
from types import SimpleNamespace
from typing import Any

import pytest
from accelerate.data_loader import prepare_data_loader, skip_first_batches
from torch.utils.data import DataLoader, RandomSampler
from transformers import TrainerControl

from bfpo.data.streams import TwoStreamDataset
from bfpo.training.callbacks import InterruptCallback, set_epoch_everywhere
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


def stopping(callback: InterruptCallback, world_size: int) -> bool:
    control = TrainerControl()
    callback.on_step_end(SimpleNamespace(world_size=world_size), SimpleNamespace(), control)  # type: ignore[arg-type]
    return control.should_training_stop and control.should_save


def test_the_first_interrupt_waits_for_the_step_and_the_second_does_not() -> None:
    before = signal.getsignal(signal.SIGINT)
    with InterruptCallback() as callback:
        assert not stopping(callback, 1)
        signal.raise_signal(signal.SIGINT)
        assert callback.requested
        assert stopping(callback, 1)
        assert signal.getsignal(signal.SIGINT) == before
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) == before


def test_several_processes_and_other_threads_are_left_alone() -> None:
    before = signal.getsignal(signal.SIGINT)
    callback = InterruptCallback()
    callback.requested = True
    assert not stopping(callback, 2)

    def enter() -> None:
        with InterruptCallback():
            pass

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert signal.getsignal(signal.SIGINT) == before
